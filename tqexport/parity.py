"""Does what runs on the device equal what was trained?

Networks with quantised activations are step functions. Two correct runtimes add floats in different orders, and a value
that sits on a rounding boundary lands on one side here and on the other there: a *flip*, after which the logits may
differ by any amount. So the logits alone prove nothing, and this module compares step by step:

* **codes**: what BitShift computes, or the integers a TFLite file stores, against quantising the float weights
  directly. Every element must be equal.
* **activations**: the runtime's whole-number activations are put into the PyTorch network as it runs, so that each
  stretch between two activation quantisers starts from the same input in both. A differing level must be the
  neighbouring one, and the reference must lie within float rounding of the boundary between them, which is computed
  from the layers of the stretch (:mod:`tqexport.rounding`); then it is a flip and is counted. Anything else is an
  error.
* **logits**: computed from the runtime's last activations, they differ by no more than rounding explains; and the
  untouched file, run as deployed, must give the same logits wherever no activation lay on a boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tqexport.layers import ActivationQuantizer, quantized_layers
from tqexport.manifest import Kernel
from tqexport.rounding import RoundingErrors
from tqexport.runtimes import RuntimeRun
from tqexport.tflite_codes import integer_codes
from tqexport.trunc_model import TruncModel
from tqexport.truncation import FLOAT_BITS, direct_codes, max_code, normalize

__all__ = ["Verdict", "compare", "normalized"]

DYNAMIC_TOLERANCE = 0.02  # of the range: kernels that round their input to 8 bits, five times a single rounding


@dataclass(frozen=True)
class Verdict:
    """How one artifact compares with the PyTorch reference at one width.

    Attributes:
        bits: The width.
        runtime: What ran the artifact.
        samples: Number of samples.
        codes: Number of codes compared.
        codes_wrong: How many differ.
        activations: Number of activations compared.
        flips: Activations that landed on the other side of a boundary they lie on.
        activations_wrong: Activations that differ otherwise.
        output_error: Largest error of the outputs as a share of the largest output, given the runtime's last
            activations.
        top1_agreement: Share of samples whose largest output is the reference's, file as deployed.
        accuracy: Share of samples classified right by the runtime, if there are labels.
        reference_accuracy: The same for PyTorch.
        problems: What is wrong, one sentence each, the first to look at first; empty if the artifact is right.
    """

    bits: int
    runtime: str
    samples: int
    codes: int
    codes_wrong: int
    activations: int
    flips: int
    activations_wrong: int
    output_error: float
    top1_agreement: float
    accuracy: float | None
    reference_accuracy: float | None
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the artifact equals the reference."""
        return not self.problems


def normalized(model: TruncModel, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Raw inputs (N, C, ...) as the network wants them: ``(x - mean) / std`` per channel, float32."""
    if model.info.normalization is None:
        return inputs
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    known = model.info.normalization
    mean, std = (np.array(values, np.float32).reshape(shape) for values in (known.mean, known.std))
    return (inputs - mean) / std


def compare(
    model: TruncModel,
    bits: int,
    run: RuntimeRun,
    inputs: npt.NDArray[np.float32],
    labels: npt.NDArray[np.integer[Any]] | None = None,
    kernel: Kernel = "exact",
) -> Verdict:
    """Compare what a runtime computed with the PyTorch reference.

    Args:
        model: The reference.
        bits: The width of the artifact.
        run: What the runtime computed for ``inputs``.
        inputs: float32 (N, *input_shape), normalised.
        labels: Class of each sample, (N,), if known.
        kernel: Of a ``dynamic`` file the codes must be equal; activations and outputs may be off by
            :data:`DYNAMIC_TOLERANCE`, and how many differ is reported.
    """
    problems: list[str] = []
    codes, codes_wrong = _compare_codes(model, bits, run, problems)
    tracer = _Tracer(run.activations, DYNAMIC_TOLERANCE if kernel == "dynamic" else 0.0)
    with torch.no_grad(), model.at_width(bits) as network:
        reference = network(torch.from_numpy(inputs)).numpy()
        with RoundingErrors() as errors, tracer.substituted(network, errors):
            outputs = network(errors.exact(torch.from_numpy(inputs)))
        given, bound = outputs.numpy(), errors.bound(outputs).numpy()
    problems += tracer.problems
    largest = max(float(np.abs(given).max()), 1e-30)
    output_error = _largest_difference(run.traced_outputs, given) / largest
    allowed = bound if kernel == "exact" else np.full_like(given, DYNAMIC_TOLERANCE * largest)
    if given.shape != run.traced_outputs.shape:
        problems.append(f"the outputs have shape {run.traced_outputs.shape}, not {given.shape}")
    elif not (np.abs(run.traced_outputs - given) <= allowed).all():
        problems.append(f"the outputs are off by {_worst(run.traced_outputs, given, allowed)}")
    deployed = np.abs(run.outputs - run.traced_outputs)
    apart = (deployed > bound).reshape(len(inputs), -1).any(1) if deployed.shape == bound.shape else np.zeros(1, bool)
    if kernel == "dynamic":
        apart[:] = False
    if unexplained := int((apart & ~tracer.on_boundary(len(inputs))).sum()):
        problems.append(
            f"{unexplained} of {len(inputs)} samples differ between {run.runtime} as deployed and with its "
            f"activations kept, by up to {deployed[apart].max():.1e}, without an activation on a boundary"
        )

    def accuracy(outputs: npt.NDArray[Any]) -> float | None:
        return None if labels is None else float((outputs.argmax(1) == labels).mean())

    return Verdict(
        bits=bits,
        runtime=run.runtime if kernel == "exact" else f"{run.runtime} {kernel}",
        samples=len(inputs),
        codes=codes,
        codes_wrong=codes_wrong,
        activations=tracer.compared,
        flips=tracer.flips,
        activations_wrong=tracer.wrong,
        output_error=output_error,
        top1_agreement=float((run.outputs.argmax(1) == reference.argmax(1)).mean()),
        accuracy=accuracy(run.outputs),
        reference_accuracy=accuracy(reference),
        problems=tuple(problems),
    )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [int(n) for n in shape if n != 1]


def _worst(found: npt.NDArray[Any], expected: npt.NDArray[Any], allowed: npt.NDArray[Any]) -> str:
    """Where two tensors are furthest apart, for people."""
    difference = np.abs(found - expected)
    index = tuple(int(i) for i in np.unravel_index(int((difference - allowed).argmax()), difference.shape))
    return (
        f"{difference[index]:.1e} at {index}: {found[index]:.7g} where PyTorch has {expected[index]:.7g}, given the "
        f"same activations before it; rounding explains {allowed[index]:.1e}"
    )


def _largest_difference(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def _compare_codes(model: TruncModel, bits: int, run: RuntimeRun, problems: list[str]) -> tuple[int, int]:
    """Number of codes compared and of those that differ, over every quantised layer."""
    total = wrong = 0
    for name, layer in quantized_layers(model.module).items():
        expected = direct_codes(normalize(layer.weight.detach()), bits, layer.scheme.quantizer).byte().numpy()
        places = run.codes.get(f"{name}.weight", [])
        if not places:
            problems.append(f"layer {name} has no codes in the file")
        for found in places:
            differing = _differing_codes(expected, found, bits)
            total, wrong = total + expected.size, wrong + differing
            if differing:
                problems.append(f"layer {name}: {differing} of {expected.size} codes differ")
    return total, wrong


def _differing_codes(expected: npt.NDArray[np.uint8], found: npt.NDArray[Any], bits: int) -> int:
    if found.dtype == np.uint8:
        # TFLite keeps an axis of 1 through 1-D convolutions.
        return int((found.reshape(expected.shape) != expected).sum()) if found.size == expected.size else expected.size
    # Stored integers: an output channel with a negative gain is turned round, u -> M_b - u.
    inputs_of_layer = found[:, : expected.shape[1]]
    if inputs_of_layer.size != expected.size:
        return expected.size
    rows = inputs_of_layer.reshape(len(expected), -1)
    straight, turned = (
        (rows != integer_codes(codes, bits).reshape(len(expected), -1)).sum(1)
        for codes in (expected, (max_code(bits) - expected).astype(np.uint8))
    )
    return int(np.minimum(straight, turned).sum())


@dataclass
class _Tracer:
    """Puts a runtime's activations into the PyTorch network, comparing each with what PyTorch computed there."""

    activations: Mapping[str, npt.NDArray[Any]]
    rounding: float = 0.0
    compared: int = 0
    flips: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)
    _near: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    @contextmanager
    def substituted(self, network: nn.Module, errors: RoundingErrors) -> Iterator[None]:
        """Within the block every activation quantiser of ``network`` gives the runtime's values."""
        calls: dict[str, int] = {}
        handles = []
        for name, module in network.named_modules():
            if isinstance(module, ActivationQuantizer) and module.bits != FLOAT_BITS:

                def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor:
                    calls[name] = calls.get(name, 0) + 1
                    key = f"{name}/Round" if calls[name] == 1 else f"{name}/Round_{calls[name]}"
                    assert isinstance(module, ActivationQuantizer)
                    levels = self._levels(key, module.bits, args[0].numpy(), errors.bound(args[0]).numpy())
                    return output if levels is None else errors.exact(torch.from_numpy(levels / max_code(module.bits)))

                handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def on_boundary(self, samples: int) -> npt.NDArray[np.bool_]:
        """Which samples have an activation within float rounding of a boundary, (N,)."""
        return np.any(self._near, axis=0) if self._near else np.zeros(samples, np.bool_)

    def _levels(
        self, key: str, bits: int, value: npt.NDArray[np.float32], bound: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32] | None:
        """The runtime's levels of an activation, compared with those of PyTorch's ``value``; None where it has none."""
        steps = max_code(bits)
        found = self.activations.get(key)
        if found is None or _without_ones(found.shape) != _without_ones(value.shape):
            where = "is not in the file" if found is None else f"has shape {found.shape}, not {value.shape}"
            self.problems.append(f"activation {key} {where}")
            return None
        found = found.reshape(value.shape)  # TFLite keeps an axis of 1 through 1-D convolutions
        scaled = value.clip(0, 1).astype(np.float64) * steps
        expected = np.rint(value.clip(0, 1) * np.float32(steps))
        rounding = bound * steps + 2 * np.finfo(np.float32).eps * scaled
        distance = np.abs(scaled - np.floor(scaled) - 0.5)  # from the nearest boundary, in steps
        near = distance <= rounding
        self._near.append(np.asarray(near.reshape(len(near), -1).any(1)))

        differs = found != expected
        flip = differs & near & (np.abs(found - expected) == 1)
        wrong = differs & ~flip
        self.compared += differs.size
        self.flips += int(flip.sum())
        self.wrong += int(wrong.sum())
        if self.rounding:  # the next level, or a small share of the range, is what integer kernels may be off
            wrong &= np.abs(found - expected) > max(1.0, self.rounding * steps)
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            self.problems.append(
                f"activation {key.split('/')[0]}: {int(wrong.sum())} of {wrong.size} differ, first at {index}: "
                f"level {found[index]:g} where PyTorch has {expected[index]:g} (of {scaled[index]:.6f}, "
                f"of which rounding explains {rounding[index]:.1e}), {steps} levels"
            )
        return found
