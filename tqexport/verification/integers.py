"""Is an integer file the integer network, to the last bit, and is that the PyTorch network?

Two steps, each with the runtime's own values as the input of every layer, so that one difference does not hide the
next:

* **against the integer model** (:mod:`tqexport.integer.model`) with that runtime's rounding: every constant of the file
  (weights, biases, scales, zero points), every setting and wire is that of a fresh export, as of other kernels but to
  the last bit; every level that the runtime gives, and the outputs of the file, must be equal.
* **against PyTorch**, whose network has the same grids and rounds to them in float32: a level must be equal, or that of
  a number near enough to PyTorch's value; then it is a flip and is counted. How near that must be is computed: what
  float32 rounding explains of PyTorch's value (:mod:`tqexport.verification.rounding`), and what the integer arithmetic
  rounds itself (:func:`_own_rounding`).

Runtimes that keep no values inside (XNNPACK, TFLite Micro) are compared by their outputs alone; the second step then
takes the integer model's values, which the outputs were found equal to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tqexport.backends.parameters import Parameters
from tqexport.integer.arithmetic import Rounding, move_factor
from tqexport.integer.grids import HIGHEST, without_grids
from tqexport.integer.model import Add, Average, Concat, Convolution, IntegerModel, Operation, Requantize
from tqexport.integer.naming import INPUT, NamedCalls
from tqexport.integer.runtime import IntegerRun, IntegerRuntime, Levels
from tqexport.model import TruncModel
from tqexport.training.quantizers import ActivationQuantizer
from tqexport.verification.comparison import Verdict
from tqexport.verification.rounding import RoundingErrors

__all__ = ["IntegerComparison"]

_RELATIVE = 2.0**-20  # of what is rounded: three float32 factors and their product, or XNNPACK's factors of 21 bits

Array = npt.NDArray[Any]


class IntegerComparison:
    """Compares what a runtime computed of an integer file with the integer model and with PyTorch."""

    def __init__(
        self,
        model: TruncModel,
        network: IntegerModel,
        runtime: IntegerRuntime,
        given: IntegerRuntime,
        parameters: Parameters,
    ) -> None:
        """Start without a sample.

        Args:
            model: The calibrated network.
            network: Its integer model at the width of the file.
            runtime: The file, open, with values named as tqexport names them.
            given: The file as it is given, which may be the same, in the same runtime. Its outputs are compared.
            parameters: How those of the file compare with the checkpoint's.
        """
        self._model, self._network, self._runtime, self._given = model, network, runtime, given
        self._parameters, self._problems = parameters, dict(parameters.differences)
        self._levels = self._flips = self._wrong = self._samples = self._agreeing = 0
        self._flip_bound = 0.0
        self._right: list[tuple[int, int]] = []
        for part in runtime.differing:
            self._problems[part] = f"{part}: the file has it otherwise than the checkpoint gives"
        self._differing = {*self._problems}

    def add(self, inputs: npt.NDArray[np.float32], labels: npt.NDArray[np.integer[Any]] | None = None) -> None:
        """Run and compare further samples, float32 (N, *input_shape), and their classes (N,) if known."""
        network, rounding = self._network, self._runtime.rounding
        run = self._runtime.run(inputs)
        if self._given is not self._runtime:
            run = IntegerRun(run.values, self._given.run_untouched(inputs))
        if not self._fits(run, len(inputs)):
            return
        if run.values:
            for operation in network.operations:
                expected = network.compute(operation, run.values, rounding)
                self._compare(operation.output, run.values[operation.output], expected)
        values = network.run(inputs, rounding)
        self._compare("the outputs", run.outputs, values[network.output])
        self._against_pytorch(run.values or values)

        with torch.no_grad(), self._model.at_width(self._network.bits) as reference:
            floats = reference(torch.from_numpy(inputs)).numpy()
        classes = network.to_floats(network.output, run.outputs).argmax(1)
        expected_classes = floats.argmax(1)
        self._samples += len(inputs)
        self._agreeing += int((classes == expected_classes).reshape(len(inputs), -1).all(1).sum())
        if labels is not None:
            self._right.append((int((classes == labels).sum()), int((expected_classes == labels).sum())))

    def verdict(self) -> Verdict:
        """What was found in all samples so far."""
        codes = [layer for layer in self._network.operations if isinstance(layer, Convolution) and layer.codes]
        samples = max(self._samples, 1)
        accuracy, reference_accuracy = (
            (sum(right[i] for right in self._right) / samples if self._right else None) for i in (0, 1)
        )
        differing = {constant.rpartition(".weight")[0] for constant in self._differing}
        sizes = {layer.name: layer.codes.codes.size for layer in codes if layer.codes}
        return Verdict(
            bits=self._network.bits,
            runtime=f"{self._runtime.name} integer",
            samples=self._samples,
            parameters="differ" if self._differing else self._parameters.verdict,
            codes=sum(sizes.values()),
            codes_wrong=sum(size for layer, size in sizes.items() if layer in differing),
            activations=self._levels,
            flips=self._flips,
            flip_bound=self._flip_bound,
            activations_wrong=self._wrong,
            layers={},
            output_error=0.0,
            output_bound=0.0,
            top1_agreement=self._agreeing / samples,
            accuracy=accuracy,
            reference_accuracy=reference_accuracy,
            diverged=next(iter(self._problems), None),
            problems=tuple(self._problems.values()),
        )

    def _fits(self, run: IntegerRun, count: int) -> bool:
        """Whether every value has the shape that it has in the integer model; the first that has not is a problem."""
        for name, levels in {**run.values, "the outputs": run.outputs}.items():
            shape = (count, *self._network.shapes.get(name, self._network.shapes[self._network.output]))
            if levels.shape != shape:
                self._problems.setdefault(
                    name,
                    f"{name}: the file computes levels of shape {levels.shape}, not {shape}, so none were compared",
                )
                return False
        return True

    def _compare(self, name: str, levels: Levels, expected: Levels) -> None:
        """The integer model: every level must be equal."""
        distance = np.abs(levels.astype(np.int16) - expected)
        if distance.any():
            index = tuple(int(i) for i in np.argwhere(distance)[0])
            self._wrong += int(np.count_nonzero(distance))
            self._problems.setdefault(
                name,
                f"{name}: {np.count_nonzero(distance)} of {distance.size} levels are not those of the integer model "
                f"given the same input, first at {index}: {levels[index]} where it has {expected[index]}",
            )

    def _against_pytorch(self, values: Mapping[str, Levels]) -> None:
        """PyTorch: every level must be equal, or a flip."""
        given = torch.from_numpy(self._network.to_floats(INPUT, values[INPUT]))
        with (
            torch.no_grad(),
            self._model.at_width(self._network.bits) as reference,
            without_grids(reference),
            RoundingErrors() as errors,
            _PutIn(reference, self._network, values, errors, self._level),
        ):
            reference(errors.exact(given))

    def _level(self, operation: Operation, value: Array, bound: Array, levels: Levels) -> None:
        """Compare PyTorch's value of an operation, known up to ``bound``, with the runtime's levels."""
        grid = self._network.grids[operation.output]
        scaled = value.astype(np.float64) / grid.scale + grid.zero_point
        expected = np.clip(np.rint(scaled), grid.low, grid.high)
        allowed = bound / grid.scale + _own_rounding(operation, self._network, self._runtime.rounding, value)
        differs = levels != expected
        # Some number within ``allowed`` of PyTorch's has this level. A bias in coarse units allows several levels.
        lowest, highest = np.ceil(scaled - allowed - 0.5), np.floor(scaled + allowed + 0.5)
        explained = (np.clip(lowest, grid.low, grid.high) <= levels) & (levels <= np.clip(highest, grid.low, grid.high))
        wrong = differs & ~explained
        self._levels += differs.size
        self._flips += int(differs.sum() - wrong.sum())
        self._flip_bound = max(self._flip_bound, float(allowed.max()))
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            self._wrong += int(wrong.sum())
            self._problems.setdefault(
                operation.output,
                f"{operation.output}: {int(wrong.sum())} of {wrong.size} levels differ from PyTorch, first at {index}: "
                f"{levels[index]} where PyTorch has {expected[index]:g} (of {scaled[index]:.6f}, give or take "
                f"{np.broadcast_to(allowed, scaled.shape)[index]:.1e}), given the same input",
            )


def _own_rounding(operation: Operation, network: IntegerModel, rounding: Rounding, value: Array) -> Array:
    """How far the integer arithmetic may be from real numbers in front of its last rounding, in levels.

    A share of the result for its factors, which are float32 or of 21 bits; half a unit of a bias, which is a whole
    number of units; and what a runtime that rounds twice loses the first time (:func:`_first_rounding`).
    """
    target, sources = network.grids[operation.output], [network.grids[name] for name in operation.inputs]
    magnitude = np.abs(value.astype(np.float64)) / target.scale
    twice = rounding in ("litert", "tflm")
    step = sources[0].scale / target.scale
    match operation:
        case Add():
            return np.asarray(_RELATIVE * sum(HIGHEST * source.scale for source in sources) / target.scale)
        case Convolution():
            unit = step * operation.scale.astype(np.float64)
            per_channel = unit / 2 + (_first_rounding(unit) if twice else 0.0)
            return np.asarray(_RELATIVE * magnitude + per_channel.reshape(1, -1, *[1] * (value.ndim - 2)))
        case Average():
            count = float(np.prod(network.shapes[operation.inputs[0]][1:]))
            first = _first_rounding(step / 2 ** np.floor(np.log2(count))) if twice else 0.0
            return np.asarray(_RELATIVE * (magnitude + HIGHEST * step) + first)
        case Concat():
            # Terms with grids of their own are moved to the target's in front of it, which PyTorch knows nothing of.
            moves = {move.output: move for move in network.operations if isinstance(move, Requantize)}
            moved = [moves[name].inputs[0] for name in operation.inputs if name.startswith(f"{operation.name}/")]
            lost = [_lost_in_move(network.grids[name].scale / target.scale, rounding) for name in moved]
            return np.asarray(_RELATIVE * magnitude + max(lost, default=0.0))
        case Requantize():
            return np.asarray(_RELATIVE * magnitude + _lost_in_move(step, rounding))
    return np.asarray(_RELATIVE * magnitude)


def _lost_in_move(ratio: float, rounding: Rounding) -> float:
    """What a move to another grid loses beside its last rounding, in levels."""
    if (factor := move_factor(ratio, rounding)) is not None:
        return HIGHEST * abs(factor - ratio)
    return 0.0 if rounding in ("real", "web") else float(_first_rounding(ratio))


def _first_rounding(factor: Any) -> Array:
    """What is lost where a product with ``factor`` is rounded to a whole number and then shifted right, in levels.

    TFLite's ``MultiplyByQuantizedMultiplier``: half a whole number, shifted by the exponent of the factor.
    """
    exponent = np.frexp(np.asarray(factor, np.float64))[1]
    return np.where(exponent < 0, 0.5 * np.exp2(np.minimum(exponent, 0)), 0.0)


class _PutIn(NamedCalls):
    """Runs PyTorch's network with a runtime's values in the place of its own, each shown to a function first."""

    def __init__(
        self,
        root: nn.Module,
        network: IntegerModel,
        values: Mapping[str, Levels],
        errors: RoundingErrors,
        look: Callable[[Operation, Array, Array, Levels], None],
    ) -> None:
        super().__init__(root)
        self._network, self._values, self._errors, self._look = network, values, errors, look
        self._operations = {operation.output: operation for operation in network.operations}

    def on_module(self, name: str, module: nn.Module, args: Sequence[Any], output: Any) -> Any:
        # A quantiser rounds what comes in; of everything else the grid rounds what comes out.
        return self._replaced(name, args[0] if isinstance(module, ActivationQuantizer) else output, output)

    def on_function(self, name: str, function: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG002
        return self._replaced(name, output, output)

    def _replaced(self, name: str, value: Any, output: Any) -> Any:
        operation = self._operations.get(name)
        if operation is None or not isinstance(value, Tensor):
            return output
        levels = self._values[name].reshape(value.shape)
        self._look(operation, value.numpy(), self._errors.bound(value).numpy(), levels)
        floats = self._network.to_floats(name, levels)
        return self._errors.exact(torch.from_numpy(floats))
