"""Layer by layer: a runtime's values in the place of PyTorch's, each compared with what PyTorch computed there.

Every layer starts from the same input in both, so what it computes must agree up to float32 rounding, whatever came
before. See ``comparison.py`` for what that proves, and ``rounding.py`` for the bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from tqexport.backends.running import RuntimeRun, other_orders
from tqexport.layer_kinds import kind_of
from tqexport.outputs import ONLY_OUTPUT, run_network
from tqexport.training.layers import SwitchableBatchNorm
from tqexport.training.quantizers import ActivationQuantizer
from tqexport.truncation import FLOAT_BITS, max_code
from tqexport.verification.codes import first_index
from tqexport.verification.rounding import RoundingErrors

__all__ = ["LayerError", "Trace", "count_calls", "furthest_apart", "numbers"]

Array = npt.NDArray[Any]

_NEAR = 1e-3  # of a value's largest element; two layers of one shape are further apart


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from PyTorch's, given the same input.

    Attributes:
        error: Largest difference, as a share of the layer's largest output.
        bound: Largest difference that float rounding explains, in the same unit.
    """

    error: float
    bound: float


@dataclass
class Trace:
    """Puts a runtime's values into the PyTorch network as it runs, comparing each with what PyTorch computed there.

    Attributes:
        tolerance: What activations and outputs may be off by, as a share of the range, for kernels that round their
            input; 0 asks for what float32 rounding explains.
        compared: Number of activations compared.
        flips: Of these, how many landed on the other side of a boundary that they lie on.
        wrong: How many differ otherwise.
        flip_bound: The furthest from a boundary that any activation might be for a flip, in steps.
        layers: The layers whose output the runtime gave, by module name.
        output: How far the outputs are from those of PyTorch, the worst of them.
        problems: By layer, a sentence on each that differs, in the order they were met; the first of several batches.
    """

    tolerance: float = 0.0
    compared: int = 0
    flips: int = 0
    wrong: int = 0
    flip_bound: float = 0.0
    layers: dict[str, LayerError] = field(default_factory=dict)
    output: LayerError = LayerError(0.0, 0.0)
    problems: dict[str, str] = field(default_factory=dict)
    _near: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    _samples: int = 0  # of this run
    _calls: dict[str, int] = field(default_factory=dict)  # so far in this run
    _calls_in_all: Mapping[str, int] = field(default_factory=dict)
    _errors: RoundingErrors = field(default_factory=RoundingErrors)  # of this run

    def run(
        self, network: nn.Module, run: RuntimeRun, inputs: Sequence[Tensor], calls: Mapping[str, int]
    ) -> list[Array] | None:
        """Run samples through the reference, with the values of the runtime in the place of its own.

        Args:
            network: The reference, at the width of the artifact.
            run: What the runtime computed.
            inputs: A tensor (N, *shape) for each input.
            calls: How often each module is called in one run (:func:`count_calls`).

        Returns:
            What rounding explains of each output, or None where their number or a shape is wrong.
        """
        self._near, self._calls, self._calls_in_all = [], {}, calls
        self._samples = len(inputs[0])
        self._errors = RoundingErrors()
        with self._errors as errors, self._hooks(network, run):
            outputs = run_network(network, [errors.exact(values) for values in inputs])
        if len(outputs) != len(run.traced_outputs):
            self.problems.setdefault("the outputs", f"there are {len(run.traced_outputs)} outputs, not {len(outputs)}")
            self.output = LayerError(math.inf, 0.0)
            return None
        # In the order of the network, whatever a tool called them.
        pairs = zip(outputs.items(), run.traced_outputs.values(), strict=True)
        bounds = [self._output(name, output, computed) for (name, output), computed in pairs]
        known = [bound for bound in bounds if bound is not None]
        return known if len(known) == len(bounds) else None

    def _output(self, name: str, output: Tensor, computed: Array) -> Array | None:
        """Compare one output; returns what rounding explains of it, or None where its shape is wrong."""
        title = "the outputs are" if name == ONLY_OUTPUT else f"output {name} is"
        place = "the outputs" if name == ONLY_OUTPUT else f"output {name}"
        if computed.shape != tuple(output.shape):
            self.problems.setdefault(place, f"{title} of shape {computed.shape}, not {tuple(output.shape)}")
            self.output = LayerError(math.inf, 0.0)
            return None
        given = numbers(output.numpy())
        bound: Array = self._errors.bound(output).numpy().astype(given.dtype)
        largest, difference = _largest(given), np.abs(numbers(computed) - given)
        self.output = _worse(self.output, LayerError(float(difference.max()) / largest, float(bound.max()) / largest))
        allowed = np.full_like(given, self.tolerance * largest) if self.tolerance else bound
        if not (difference <= allowed).all():
            among = self._errors.layers(output)
            self.problems.setdefault(
                _from(among, place), f"{title} off by {_furthest(numbers(computed), given, allowed)}{_where(among)}"
            )
        return bound

    def on_boundary(self, samples: int) -> npt.NDArray[np.bool_]:
        """Which samples of the last run have an activation within float rounding of a boundary, (N,)."""
        return np.any(self._near, axis=0) if self._near else np.zeros(samples, np.bool_)

    def _hooks(self, network: nn.Module, run: RuntimeRun) -> ExitStack:
        """Until the result is closed, the activation quantisers and layers of ``network`` give the runtime's values."""
        hooks = ExitStack()
        candidates = _Candidates(run.values)
        for name, module in network.named_modules():
            if not _quantizes(module) and (not _is_layer(name, module) or self.tolerance):
                continue

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> Any:
                self._calls[name] = self._calls.get(name, 0) + 1
                if _quantizes(module):
                    value = self._levels(name, module, args[0], run.activations)
                    return output if value is None else self._given(value)
                # Of several results, as attention has them, the file has at most one by the name of the layer.
                # And the last operator of somebody's own class may be that of a module inside it, such as a ReLU.
                alone = isinstance(output, Tensor) and _is_of_torch(module)
                return tree_map(
                    lambda part: self._layer(name, part, candidates, alone=alone) if isinstance(part, Tensor) else part,
                    output,
                )

            hooks.enter_context(module.register_forward_pre_hook(self._count_as_rounded))
            hooks.enter_context(module.register_forward_hook(hook))
        return hooks

    def _count_as_rounded(self, _module: nn.Module, args: Any) -> None:
        """Layers may work on constants, as on a table of distances: what they make of these is rounded all the same."""
        for value in args[:1]:
            if isinstance(value, Tensor):
                self._errors.rounded(value)

    def _given(self, value: Array) -> Tensor:
        """A value of the runtime in PyTorch's order in memory, which code that calls view() counts on."""
        return self._errors.exact(torch.from_numpy(np.ascontiguousarray(value)))

    def _layer(self, name: str, output: Tensor, candidates: _Candidates, *, alone: bool) -> Tensor:
        """The runtime's output of a layer, or PyTorch's where the file does not have it: the layer is part of another.

        Args:
            name: Of the layer.
            output: PyTorch's.
            candidates: What the runtime gave.
            alone: Whether it is all that the layer returns, and has the layer's name in files.
        """
        expected: Array = output.numpy()
        bound: Array = self._errors.bound(output).numpy()
        # Of a module that is called several times, the file has one value by that name: of which call is not known.
        once = alone and self._calls_in_all[name] == 1
        value = candidates.named(name, expected.shape) if once else None
        if value is None:
            value = candidates.like(expected, bound)
            if value is None:
                self._errors.mark(output, name)
                return output
        difference, largest = np.abs(value - expected), _largest(expected)
        error = LayerError(float(difference.max()) / largest, float(bound.max()) / largest)
        self.layers[name] = _worse(self.layers.get(name, error), error)
        if not (difference <= bound).all():
            where = _where(self._errors.layers(output))
            self.problems.setdefault(name, f"layer {name} is off by {_furthest(value, expected, bound)}{where}")
        return self._given(value)

    def _merged(self, activations: Mapping[str, Array], expected: Array, near: npt.NDArray[np.bool_]) -> Array | None:
        """The levels of another activation that are also these: a converter rounds once what is rounded alike."""
        for levels in activations.values():
            if levels.size == expected.size:
                levels = _in_shape(levels, expected, self._samples)
                if not _apart(levels, expected, near)[1].any():
                    return levels
        return None

    def _levels(self, name: str, module: nn.Module, input: Tensor, activations: Mapping[str, Array]) -> Array | None:
        """The runtime's value of an activation, its levels compared with PyTorch's; None where it has none."""
        assert isinstance(module, ActivationQuantizer)
        value, among = input.numpy(), self._errors.layers(input)
        low, high, per_one = (part.detach().numpy() for part in module.grid())
        clipped, steps = value.clip(low, high), max_code(module.bits)
        key = f"{name}/Round" if self._calls[name] == 1 else f"{name}/Round_{self._calls[name]}"
        scaled = clipped.astype(np.float64) * per_one
        expected = np.rint(clipped * per_one)
        rounding = self._errors.bound(input).numpy() * per_one + 2 * np.finfo(np.float32).eps * np.abs(scaled)
        near = np.abs(scaled - np.floor(scaled) - 0.5) <= rounding  # the boundaries lie half-way between the levels
        levels = activations.get(key)
        if (value == value[:1]).all():  # the same for every sample, such as the first state of a sequence
            if levels is None:
                return None  # a converter computes it
            if levels.size < value.size and levels.size % value[:1].size == 0:
                levels = np.repeat(levels.reshape(-1, *value.shape[1:])[:1], len(value), axis=0)
        if levels is None:
            levels = self._merged(activations, expected, near)
        if levels is None or levels.size != value.size:
            where = "is not in the file" if levels is None else f"has shape {levels.shape}, not {value.shape}"
            self.problems.setdefault(name, f"activation {key} {where}")
            return None
        levels = _in_shape(levels, expected, self._samples)
        self._near.append(_of_samples(near, self._samples))
        self.flip_bound = max(self.flip_bound, float(rounding.max()))

        differs, wrong = _apart(levels, expected, near)
        self.compared += differs.size
        self.flips += int(differs.sum() - wrong.sum())
        self.wrong += int(wrong.sum())
        if self.tolerance:  # the next level, or a small share of the range, is what integer kernels may be off
            wrong &= np.abs(levels - expected) > max(1.0, self.tolerance * steps)
        if wrong.any():
            index = first_index(wrong)
            self.problems.setdefault(
                _from(among, name),
                f"activation {name}: {int(wrong.sum())} of {wrong.size} differ, first at {index}: level "
                f"{levels[index]:g} where PyTorch has {expected[index]:g} (of {scaled[index]:.6f}, give or take "
                f"{rounding[index]:.1e}), {steps} levels{_where(among)}",
            )
        quantized: Array = levels / per_one
        return quantized


def _apart(levels: Array, expected: Array, near: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Where levels differ, and where that is no flip; ``near`` says which values lie on a boundary."""
    differs = levels != expected
    return differs, differs & ~(near & (np.abs(levels - expected) == 1))


def _of_samples(near: npt.NDArray[np.bool_], samples: int) -> npt.NDArray[np.bool_]:
    """For which samples any element is true, (N,).

    A network may have moved the samples to another axis than the first. Where several axes are as long, each may be
    theirs; where none is, any sample may be the one.
    """
    axes = [axis for axis, size in enumerate(near.shape) if size == samples]
    if not axes:
        return np.full(samples, near.any())
    by_axis = [np.moveaxis(near, axis, 0).reshape(samples, -1).any(1) for axis in axes]
    return np.asarray(np.any(by_axis, axis=0))


def _in_shape(levels: Array, expected: Array, samples: int) -> Array:
    """The levels in PyTorch's shape.

    A converter may round before a reshape instead of behind it, as onnx2tf does with the groups of a GroupNorm, or
    before the heads of attention are put together, and keeps an axis of 1 through 1-D convolutions. A runtime that
    takes a sample at a time gives the samples in front, where PyTorch may have the steps of a sequence. Of the orders
    in which the file may then have the levels, all of which are compared one by one, that is meant which has most of
    them right.
    """
    if _without_ones(levels.shape) == _without_ones(expected.shape):
        return levels.reshape(expected.shape)
    in_file = np.moveaxis(levels, 1, -1) if levels.ndim > 2 else levels
    last = in_file.reshape(len(expected), *expected.shape[2:], *expected.shape[1:2])
    orders = [levels.reshape(expected.shape), in_file.reshape(expected.shape), np.moveaxis(last, -1, 1)]
    for axis, size in enumerate(expected.shape):
        if size == samples:
            others = (*expected.shape[:axis], *expected.shape[axis + 1 :])
            orders += [np.moveaxis(value.reshape(size, *others), 0, axis) for value in (levels, in_file)]
    orders += other_orders(levels, expected.shape)
    return max(orders, key=lambda order: np.count_nonzero(order == expected))


def _from(among: Sequence[str], name: str) -> str:
    """Where something first differs: in ``name``, or in what leads to it and cannot be told from it."""
    return f"{among[0]} to {name}" if among else name


def _where(among: Sequence[str]) -> str:
    """The end of a sentence on a difference: which layers it may come from."""
    return f"; it comes from {' or '.join(among)}" if among else ""


def numbers(values: Array) -> Array:
    """Values that can be subtracted: whole numbers and truth values as float64, which has all that occur exactly."""
    return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)


def furthest_apart(outputs: Sequence[Array], expected: Sequence[Array]) -> float:
    """Largest difference of an output, as a share of the largest number of the expected one.

    Infinite where shapes differ, or where a difference is no number.
    """
    if [value.shape for value in outputs] != [value.shape for value in expected]:
        return math.inf
    pairs = [(numbers(one), numbers(other)) for one, other in zip(outputs, expected, strict=True)]
    shares = [float(np.abs(one.astype(np.float64) - other).max()) / _largest(other) for one, other in pairs]
    return max(shares) if np.isfinite(shares).all() else math.inf


def count_calls(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Run a network as it is; returns its outputs, and how often each of its modules was called."""
    calls: dict[str, int] = {}

    def hook(_module: nn.Module, _args: Any, _output: Any, name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(functools.partial(hook, name=name)))
        return run_network(network, inputs), calls


class _Candidates:
    """The values that a runtime gave, looked up by name or by content."""

    def __init__(self, values: Mapping[str, Array]) -> None:
        self._values = values
        self._by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, value in values.items():
            self._by_shape.setdefault(_without_ones(value.shape), []).append(name)

    def named(self, name: str, shape: Sequence[int]) -> Array | None:
        """The value of a name, or None if there is none of the shape."""
        value = self._values.get(name)
        return None if value is None or value.shape != tuple(shape) else value

    def like(self, expected: Array, bound: Array) -> Array | None:
        """The value that is nearest to ``expected``, if that is as near as ``bound`` says, and near; or None.

        In a deep network without rounded activations a bound may explain anything, another layer's value, too.
        """
        some = np.unravel_index(np.linspace(0, expected.size - 1, 256).astype(int), expected.shape)
        allowed = np.minimum(bound, _NEAR * _largest(expected))
        nearest: tuple[float, Array | None] = (math.inf, None)
        for name in self._by_shape.get(_without_ones(expected.shape), ()):
            value: Array = self._values[name].reshape(expected.shape)
            if (np.abs(value[some] - expected[some]) <= allowed[some]).all():
                difference = np.abs(value - expected)
                if (difference <= allowed).all() and difference.max() < nearest[0]:
                    nearest = float(difference.max()), value
        return nearest[1]


def _quantizes(module: nn.Module) -> bool:
    return isinstance(module, ActivationQuantizer) and module.bits != FLOAT_BITS


def _is_layer(name: str, module: nn.Module) -> bool:
    """Whether the output of a module is compared; a BatchNorm of one width is part of that of all."""
    others = (nn.modules.batchnorm._BatchNorm, SwitchableBatchNorm, ActivationQuantizer)
    return (kind_of(module) is not None or isinstance(module, others)) and ".bn_dict." not in f".{name}"


def _is_of_torch(module: nn.Module) -> bool:
    """Whether the forward of a module is PyTorch's or ours."""
    return parametrize.type_before_parametrizations(module).__module__.startswith(("torch.nn.", "tqexport."))


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(n) for n in shape if n != 1)


def _largest(values: Array) -> float:
    return max(float(np.abs(values).max()), 1e-30)


def _worse(one: LayerError, other: LayerError) -> LayerError:
    return LayerError(max(one.error, other.error), max(one.bound, other.bound))


def _furthest(computed: Array, expected: Array, allowed: Array) -> str:
    """Where two tensors are furthest apart, for people."""
    difference = np.abs(computed - expected)
    index = tuple(int(i) for i in np.unravel_index(int((difference - allowed).argmax()), difference.shape))
    return (
        f"{difference[index]:.1e} at {index}: {computed[index]:.7g} where PyTorch has {expected[index]:.7g}, given the "
        f"same input; rounding explains {allowed[index]:.1e}"
    )
