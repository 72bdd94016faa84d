"""Does what runs on the device equal what was trained?

Networks with quantised activations are step functions. Two correct runtimes add floats in different orders, and a value
that sits on a rounding boundary lands on one side here and on the other there: a *flip*, after which the logits may
differ by any amount. So the logits alone prove nothing, and this module compares step by step:

* **codes**: what BitShift computes, or the integers a TFLite file stores, against quantising the float weights
  directly. Every element must be equal.
* **layers**: the runtime's activations and layer outputs are put into the PyTorch network as it runs, so that each
  layer starts from the same input in both. What it computes must agree up to float rounding, and a level of a quantised
  activation must be equal, or the neighbouring one with PyTorch's value within float rounding of the boundary between
  the two; then it is a flip and is counted. Anything else is an error. The bound on float rounding is computed from the
  layer (:mod:`tqexport.verification.rounding`).
* **network**: the outputs agree likewise, given the runtime's last activations; and the untouched file gives the same
  outputs wherever no activation lay on a boundary.
* **accuracy**: of both on labelled samples, for people; where they differ, one of the above says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tqexport.artifacts.manifest import Kernel
from tqexport.layer_kinds import kind_of
from tqexport.model import TruncModel
from tqexport.training.layers import SwitchableBatchNorm
from tqexport.training.quantizers import ActivationQuantizer
from tqexport.truncation import FLOAT_BITS, max_code
from tqexport.verification.codes import compare_codes
from tqexport.verification.rounding import RoundingErrors
from tqexport.verification.runtimes import RuntimeRun

__all__ = ["Comparison", "LayerError", "Verdict", "compare", "wilson_interval"]

DYNAMIC_TOLERANCE = 0.02  # of the range: kernels that round their input to 8 bits, five times a single rounding

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from PyTorch's, given the same input.

    Attributes:
        error: Largest difference, as a share of the layer's largest output.
        bound: Largest difference that float rounding explains, in the same unit.
    """

    error: float
    bound: float


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
        flip_bound: The furthest from a boundary that any activation might be for that, in steps.
        activations_wrong: Activations that differ otherwise.
        layers: By module name, the layers whose output the runtime gave.
        output_error: Largest error of the outputs as a share of the largest output, given the runtime's last
            activations.
        output_bound: Largest such error that float rounding explains.
        top1_agreement: Share of samples whose largest output is the reference's, untouched file.
        accuracy: Share of samples classified right by the runtime, if there are labels.
        reference_accuracy: The same for PyTorch.
        diverged: The first layer or activation that differs, if one does.
        problems: What is wrong, one sentence each, the first to look at first; empty if the artifact is right.
    """

    bits: int
    runtime: str
    samples: int
    codes: int
    codes_wrong: int
    activations: int
    flips: int
    flip_bound: float
    activations_wrong: int
    layers: Mapping[str, LayerError]
    output_error: float
    output_bound: float
    top1_agreement: float
    accuracy: float | None
    reference_accuracy: float | None
    diverged: str | None
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the artifact equals the reference."""
        return not self.problems

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the accuracy; see :func:`wilson_interval`."""
        return None if self.accuracy is None else wilson_interval(self.accuracy, self.samples)

    @property
    def worst_layer(self) -> tuple[str, float]:
        """Name and error of the layer that is furthest from PyTorch; the outputs where no other layer was kept."""
        errors = {name: layer.error for name, layer in self.layers.items()} | {"outputs": self.output_error}
        worst = max(errors, key=lambda name: errors[name])
        return worst, errors[worst]


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """95 % confidence interval of a share of ``samples`` (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927, 209-212).

    Example:
        >>> low, high = wilson_interval(0.9, 100)
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
    """
    z = 1.959964
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def compare(
    model: TruncModel,
    bits: int,
    run: RuntimeRun,
    inputs: npt.NDArray[np.float32],
    labels: npt.NDArray[np.integer[Any]] | None = None,
    kernel: Kernel = "exact",
) -> Verdict:
    """Compare what a runtime computed with the PyTorch reference, all samples at once; see :class:`Comparison`."""
    comparison = Comparison(model, bits, kernel)
    comparison.add(run, inputs, labels)
    return comparison.verdict()


class Comparison:
    """Compares what a runtime computed with the PyTorch reference, some samples at a time."""

    def __init__(self, model: TruncModel, bits: int, kernel: Kernel = "exact") -> None:
        """Start without a sample.

        Args:
            model: The reference.
            bits: The width of the artifact.
            kernel: Of a ``dynamic`` file the codes must be equal; activations and outputs may be off by
                :data:`DYNAMIC_TOLERANCE`, and how many differ is reported.
        """
        self._model, self._bits, self._kernel = model, bits, kernel
        self._trace = _Trace(DYNAMIC_TOLERANCE if kernel == "dynamic" else 0.0)
        self._runtime = ""
        self._codes: tuple[int, int] | None = None
        self._code_problems: dict[str, str] = {}
        self._deployed_apart: list[float] = []
        self._right: list[tuple[int, int]] = []
        self._samples = self._agreeing = 0

    def add(
        self,
        run: RuntimeRun,
        inputs: npt.NDArray[np.float32],
        labels: npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """Compare further samples.

        Args:
            run: What the runtime computed for ``inputs``.
            inputs: float32 (N, *input_shape), normalised.
            labels: Class of each sample, (N,), if known.
        """
        self._runtime = run.runtime if self._kernel == "exact" else f"{run.runtime} {self._kernel}"
        if self._codes is None:
            self._codes = compare_codes(self._model, self._bits, run, self._code_problems)
        with torch.no_grad(), self._model.at_width(self._bits) as network:
            reference = network(torch.from_numpy(inputs)).numpy()
            bound = self._trace.run(network, run, torch.from_numpy(inputs))
        if self._kernel == "exact" and bound is not None and run.outputs.shape == bound.shape:
            # Two computations, each up to a bound from the reference.
            difference = np.abs(run.outputs - run.traced_outputs)
            apart = (difference > 2 * bound).reshape(len(inputs), -1).any(1) & ~self._trace.on_boundary(len(inputs))
            self._deployed_apart += difference.reshape(len(inputs), -1).max(1)[apart].tolist()
        classes, expected = run.outputs.argmax(1), reference.argmax(1)
        self._samples += len(inputs)
        if classes.shape == expected.shape:
            self._agreeing += int((classes == expected).reshape(len(inputs), -1).all(1).sum())
            if labels is not None:
                self._right.append((int((classes == labels).sum()), int((expected == labels).sum())))

    def verdict(self) -> Verdict:
        """What was found in all samples so far."""
        trace, samples = self._trace, max(self._samples, 1)
        problems = [*self._code_problems.items(), *trace.problems.items()]
        if self._deployed_apart:
            apart = (
                f"{len(self._deployed_apart)} of {samples} samples differ between {self._runtime} as deployed and with "
                f"its activations kept, by up to {max(self._deployed_apart):.1e}, without an activation on a boundary"
            )
            problems.append(("the outputs as deployed", apart))
        accuracy, reference_accuracy = (
            (sum(right[i] for right in self._right) / samples if self._right else None) for i in (0, 1)
        )
        codes, codes_wrong = self._codes or (0, 0)
        return Verdict(
            bits=self._bits,
            runtime=self._runtime,
            samples=self._samples,
            codes=codes,
            codes_wrong=codes_wrong,
            activations=trace.compared,
            flips=trace.flips,
            flip_bound=trace.flip_bound,
            activations_wrong=trace.wrong,
            layers=trace.layers,
            output_error=trace.output.error,
            output_bound=trace.output.bound,
            top1_agreement=self._agreeing / samples,
            accuracy=accuracy,
            reference_accuracy=reference_accuracy,
            diverged=next((layer for layer, _ in problems), None),
            problems=tuple(text for _, text in problems),
        )


@dataclass
class _Trace:
    """Puts a runtime's values into the PyTorch network as it runs, comparing each with what PyTorch computed there."""

    tolerance: float = 0.0  # of the range, for kernels that round their input
    compared: int = 0
    flips: int = 0
    wrong: int = 0
    flip_bound: float = 0.0
    layers: dict[str, LayerError] = field(default_factory=dict)
    output: LayerError = LayerError(0.0, 0.0)
    problems: dict[str, str] = field(default_factory=dict)  # by the layer that they are about, in order
    _near: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    _calls: dict[str, int] = field(default_factory=dict)

    def run(self, network: nn.Module, run: RuntimeRun, inputs: Tensor) -> Array | None:
        """Run samples through; returns what rounding explains of each output, or None where their shape is wrong."""
        self._near, self._calls = [], {}
        with RoundingErrors() as errors, self._hooks(network, run, errors):
            outputs = network(errors.exact(inputs))
        given: Array = outputs.numpy()
        bound: Array = errors.bound(outputs).numpy()
        found, largest = run.traced_outputs, _largest(given)
        if found.shape != given.shape:
            self.problems.setdefault("the outputs", f"the outputs have shape {found.shape}, not {given.shape}")
            self.output = LayerError(math.inf, 0.0)
            return None
        difference: Array = np.abs(found - given)
        self.output = _worse(self.output, LayerError(float(difference.max()) / largest, float(bound.max()) / largest))
        allowed = np.full_like(given, self.tolerance * largest) if self.tolerance else bound
        if not (difference <= allowed).all():
            among = errors.layers(outputs)
            self._report(
                _from(among, "the outputs"), f"the outputs are off by {_furthest(found, given, allowed)}{_where(among)}"
            )
        return bound

    def on_boundary(self, samples: int) -> npt.NDArray[np.bool_]:
        """Which samples of the last run have an activation within float rounding of a boundary, (N,)."""
        return np.any(self._near, axis=0) if self._near else np.zeros(samples, np.bool_)

    @contextmanager
    def _hooks(self, network: nn.Module, run: RuntimeRun, errors: RoundingErrors) -> Iterator[None]:
        """Within the block the activation quantisers and layers of ``network`` give the runtime's values."""
        handles = []
        candidates = _Candidates(run.values)
        for name, module in network.named_modules():
            quantizer = isinstance(module, ActivationQuantizer) and module.bits != FLOAT_BITS
            if not quantizer and (not _is_layer(name, module) or self.tolerance):
                continue

            def hook(
                module: nn.Module,
                args: tuple[Tensor, ...],
                output: Tensor,
                name: str = name,
                quantizer: bool = quantizer,
            ) -> Tensor | None:
                self._calls[name] = self._calls.get(name, 0) + 1
                if quantizer:
                    value = self._levels(name, module, args[0], errors, run.activations)
                else:
                    value = self._layer(name, output, errors, candidates)
                    if value is None:
                        errors.mark(output, name)
                return None if value is None else errors.exact(torch.from_numpy(value))

            handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layer(self, name: str, output: Tensor, errors: RoundingErrors, candidates: _Candidates) -> Array | None:
        """The runtime's output of a layer, or None where the file does not have it: the layer is part of another."""
        expected: Array = output.numpy()
        bound: Array = errors.bound(output).numpy()
        once = self._calls[name] == 1
        found = candidates.named(name, expected.shape) if once else None
        if found is None:
            found = candidates.like(expected, bound)
            if found is None:
                return None
        difference, largest = np.abs(found - expected), _largest(expected)
        error = LayerError(float(difference.max()) / largest, float(bound.max()) / largest)
        self.layers[name] = _worse(self.layers.get(name, error), error)
        if not (difference <= bound).all():
            self._report(
                name, f"layer {name} is off by {_furthest(found, expected, bound)}{_where(errors.layers(output))}"
            )
        return found

    def _levels(
        self, name: str, module: nn.Module, input: Tensor, errors: RoundingErrors, activations: Mapping[str, Array]
    ) -> Array | None:
        """The runtime's value of an activation, its levels compared with PyTorch's; None where it has none."""
        assert isinstance(module, ActivationQuantizer)
        value, among = input.numpy(), errors.layers(input)
        steps = max_code(module.bits)
        key = f"{name}/Round" if self._calls[name] == 1 else f"{name}/Round_{self._calls[name]}"
        found = activations.get(key)
        if found is None or _without_ones(found.shape) != _without_ones(value.shape):
            where = "is not in the file" if found is None else f"has shape {found.shape}, not {value.shape}"
            self._report(name, f"activation {key} {where}")
            return None
        found = found.reshape(value.shape)  # TFLite keeps an axis of 1 through 1-D convolutions
        scaled = value.clip(0, 1).astype(np.float64) * steps
        expected = np.rint(value.clip(0, 1) * np.float32(steps))
        rounding = errors.bound(input).numpy() * steps + 2 * np.finfo(np.float32).eps * scaled
        near = np.abs(scaled - np.floor(scaled) - 0.5) <= rounding  # the boundaries lie half-way between the levels
        self._near.append(np.asarray(near.reshape(len(near), -1).any(1)))
        self.flip_bound = max(self.flip_bound, float(rounding.max()))

        differs = found != expected
        wrong = differs & ~(near & (np.abs(found - expected) == 1))
        self.compared += differs.size
        self.flips += int(differs.sum() - wrong.sum())
        self.wrong += int(wrong.sum())
        if self.tolerance:  # the next level, or a small share of the range, is what integer kernels may be off
            wrong &= np.abs(found - expected) > max(1.0, self.tolerance * steps)
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            self._report(
                _from(among, name),
                f"activation {name}: {int(wrong.sum())} of {wrong.size} differ, first at {index}: level "
                f"{found[index]:g} where PyTorch has {expected[index]:g} (of {scaled[index]:.6f}, give or take "
                f"{rounding[index]:.1e}), {steps} levels{_where(among)}",
            )
        levels: Array = found / np.float32(steps)
        return levels

    def _report(self, layer: str, problem: str) -> None:
        self.problems.setdefault(layer, problem)  # of several batches the first


def _from(among: Sequence[str], name: str) -> str:
    """Where something first differs: in ``name``, or in what leads to it and cannot be told from it."""
    return f"{among[0]} to {name}" if among else name


def _where(among: Sequence[str]) -> str:
    return f"; it comes from {' or '.join(among)}" if among else ""


class _Candidates:
    """The values that a runtime gave, to be found by name or by content."""

    def __init__(self, values: Mapping[str, Array]) -> None:
        self._values = values
        self._by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, value in values.items():
            self._by_shape.setdefault(_without_ones(value.shape), []).append(name)

    def named(self, name: str, shape: Sequence[int]) -> Array | None:
        """The value of that name and shape."""
        value = self._values.get(name)
        return None if value is None or value.shape != tuple(shape) else value

    def like(self, expected: Array, bound: Array) -> Array | None:
        """A value that is ``expected`` up to ``bound``."""
        some = np.linspace(0, expected.size - 1, 256).astype(int)
        for name in self._by_shape.get(_without_ones(expected.shape), ()):
            value: Array = self._values[name].reshape(expected.shape)
            positions = np.unravel_index(some, expected.shape)
            if (np.abs(value[positions] - expected[positions]) <= bound[positions]).all() and (
                np.abs(value - expected) <= bound
            ).all():
                return value
        return None


def _is_layer(name: str, module: nn.Module) -> bool:
    """Whether the output of a module is compared; a BatchNorm of one width is part of that of all."""
    others = (nn.modules.batchnorm._BatchNorm, SwitchableBatchNorm, ActivationQuantizer)
    return (kind_of(module) is not None or isinstance(module, others)) and ".bn_dict." not in f".{name}"


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(n) for n in shape if n != 1)


def _largest(values: Array) -> float:
    return max(float(np.abs(values).max()), 1e-30)


def _worse(one: LayerError, other: LayerError) -> LayerError:
    return LayerError(max(one.error, other.error), max(one.bound, other.bound))


def _furthest(found: Array, expected: Array, allowed: Array) -> str:
    """Where two tensors are furthest apart, for people."""
    difference = np.abs(found - expected)
    index = tuple(int(i) for i in np.unravel_index(int((difference - allowed).argmax()), difference.shape))
    return (
        f"{difference[index]:.1e} at {index}: {found[index]:.7g} where PyTorch has {expected[index]:.7g}, given the "
        f"same input; rounding explains {allowed[index]:.1e}"
    )
