"""Does what runs on the device equal what was trained?

Networks with quantised activations are step functions. Two correct runtimes add floats in different orders, and a value
that sits on a rounding boundary lands on one side here and on the other there: a *flip*, after which the logits may
differ by any amount. So the logits alone prove nothing, and this module compares step by step:

* **parameters**: every constant, setting and wire of the file against a fresh export of the checkpoint, whatever the
  samples (:mod:`tqexport.backends.graphs`).
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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tqexport.backends.base import EXACT, is_exact
from tqexport.backends.parameters import Parameters
from tqexport.backends.running import RuntimeRun
from tqexport.model import TruncModel
from tqexport.verification.classes import agreement, classes_of, wilson_interval
from tqexport.verification.codes import compare_codes, expected_codes
from tqexport.verification.trace import LayerError, Trace, count_calls, numbers

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = ["DYNAMIC_TOLERANCE", "Comparison", "Verdict", "compare"]

DYNAMIC_TOLERANCE = 0.02
"""How far kernels that round their input to 8 bits may be off, of the range: five times a single rounding."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Verdict:
    """How one artifact compares with the PyTorch reference at one width.

    Attributes:
        bits: The width.
        runtime: What ran the artifact.
        samples: Number of samples.
        parameters: ``equal`` to those of a fresh export, ``differ``, or ``not compared:`` and why.
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
        top1_agreement: Share of samples whose largest output is the reference's, of every output; untouched file.
        accuracy: Share of samples classified right by the runtime, if there are labels.
        reference_accuracy: The same for PyTorch.
        diverged: The first layer or activation that differs, if one does.
        problems: What is wrong, one sentence each, in the order of the network; empty if the artifact is right.
    """

    bits: int
    runtime: str
    samples: int
    parameters: str
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
        """Name and error of the layer that is furthest from PyTorch, the outputs being the last layer."""
        errors = {name: layer.error for name, layer in self.layers.items()} | {"outputs": self.output_error}
        worst = max(errors, key=lambda name: errors[name])
        return worst, errors[worst]


def compare(
    model: TruncModel,
    bits: int,
    run: RuntimeRun,
    inputs: Array,
    labels: npt.NDArray[np.integer[Any]] | None = None,
    kernel: str = EXACT,
) -> Verdict:
    """Compare a network of one input with the PyTorch reference, all samples at once; see :class:`Comparison`."""
    comparison = Comparison(model, bits, kernel)
    comparison.add(run, (inputs,), labels)
    return comparison.verdict()


class Comparison:
    """Compares what a runtime computed with the PyTorch reference, some samples at a time."""

    def __init__(self, model: TruncModel, bits: int, kernel: str = EXACT, parameters: Parameters | None = None) -> None:
        """Prepare a comparison; :meth:`add` compares samples.

        Args:
            model: The reference.
            bits: The width of the artifact.
            kernel: Of a ``dynamic`` file the codes must be equal; activations and outputs may be off by
                :data:`DYNAMIC_TOLERANCE`, and how many differ is reported.
            parameters: How those of the artifact compare with the checkpoint's; None where there is no fresh export.
        """
        self._parameters = parameters or Parameters(b"", not_compared="there is no fresh export")
        self._model, self._bits, self._kernel = model, bits, kernel
        self._trace = Trace(0.0 if is_exact(kernel) else DYNAMIC_TOLERANCE)
        self._runtime = ""
        self._codes: tuple[int, int] | None = None  # how many were compared, and how many differ
        self._code_problems: dict[str, str] = {}
        self._deployed_apart: list[float] = []
        self._right: list[tuple[int, int]] = []
        self._samples = self._agreeing = 0

    def add(
        self,
        run: RuntimeRun,
        inputs: Batch,
        labels: npt.NDArray[np.integer[Any]] | None = None,
        *,
        counted: bool = True,
    ) -> None:
        """Compare further samples.

        Args:
            run: What the runtime computed for ``inputs``.
            inputs: An array (N, *shape) for each input, normalised.
            labels: Class of each sample by the first output, (N,), if known.
            counted: Whether they count among the samples that the verdict gives shares of.
        """
        self._runtime = run.runtime if self._kernel == EXACT else f"{run.runtime} {self._kernel}"
        if self._codes is None:
            self.add_codes(run.codes)
        given, samples = [torch.from_numpy(values) for values in inputs], len(inputs[0])
        with torch.no_grad(), self._model.at_width(self._bits) as network:
            outputs, calls = count_calls(network, given)
            bounds = self._trace.run(network, run, given, calls)
        untouched = [*run.outputs.values()]
        if is_exact(self._kernel) and bounds is not None:
            for output, traced, bound in zip(untouched, run.traced_outputs.values(), bounds, strict=True):
                # Two computations, each up to a bound from the reference.
                difference = np.abs(numbers(output) - numbers(traced)).reshape(samples, -1)
                apart = (difference > 2 * bound.reshape(samples, -1)).any(1) & ~self._trace.on_boundary(samples)
                self._deployed_apart += difference.max(1)[apart].tolist()
        if not counted:
            return
        self._samples += samples
        if bounds is not None:
            self._agreeing += int(agreement(untouched, [output.numpy() for output in outputs.values()]).sum())
        classes, expected = classes_of(untouched[0]), classes_of(next(iter(outputs.values())).numpy())
        if labels is not None and classes.shape == expected.shape == labels.shape:
            self._right.append((int((classes == labels).sum()), int((expected == labels).sum())))

    def add_codes(self, codes: Mapping[str, list[Array]]) -> None:
        """Compare the codes of the artifact, which samples play no part in.

        Args:
            codes: See :class:`tqexport.backends.running.RuntimeRun`.
        """
        expected = expected_codes(self._model, self._bits)
        # A weight without codes was folded in these, and is the one that its codes give.
        folded = expected if self._parameters.proved else self._parameters.folded
        codes = {**{name: [expected[name].codes] for name in folded if name in expected}, **codes}
        self._codes = compare_codes(expected, self._bits, codes, self._code_problems)

    def verdict(self) -> Verdict:
        """The verdict on all samples so far."""
        trace, samples = self._trace, max(self._samples, 1)
        problems = [*self._parameters.differences.items(), *self._code_problems.items(), *trace.problems.items()]
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
            parameters=self._parameters.verdict,
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
