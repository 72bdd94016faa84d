"""What a constant of a converted file is made of, recognised by its numbers: every parameter had random ones.

The converter combines neighbours. What multiplies the result of a layer, such as a gain per channel or the 1 / sqrt(d)
of attention, becomes part of the layer's filter and bias, and so does the division by the number of steps of an
activation quantiser. What is added in front of a linear layer is multiplied by its filter and added to its bias. So a
filter is a *product*, and any other constant is a product or the *sum* of a product and one more thing.

A large filter of a convolution has one random number all over, which TensorFlow handles as quickly as a scalar. Its
axis order in the file is that of the operator that reads it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.onnx.file import CONSTANT_PREFIX, LEVELS_SUFFIX
from tqexport.layer_kinds import FILTER_OPERATORS

__all__ = ["Fingerprints", "Product", "Sum", "parameters", "with_fingerprints"]

Array = npt.NDArray[np.float32]

_LEVELS = 2.0**20  # of an activation quantiser, about
_GOLDEN = (5**0.5 - 1) / 2  # the multiples of which lie as far from each other as they can, wholes aside
_LARGE = 1 << 14  # elements; TensorFlow moves each of them about several times
_ROUNDING = 1e-6  # relative; of an element of a product
_ROUNDING_OF_NUMBER = 3e-7  # relative
_ROUNDING_OF_SUM = 1e-5  # of the largest element
_SMALL = 1e-3  # a number such as epsilon hides what it is multiplied with
_TELLING = 4  # elements; fewer may agree by chance
_MOST_COUNTED = 1024  # a mean is a sum divided by a count
_DENOMINATOR = 16  # of numbers that no operator has, such as 2/3


def parameters(model: onnx.ModelProto) -> dict[str, Array]:
    """The float32 initializers that belong to the network, not to its operators, by name."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.startswith(CONSTANT_PREFIX)
    }


def with_fingerprints(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with random numbers as its parameters, always the same ones.

    It is one that tells its axes apart, as onnx2tf tries orders of axes on it: values neither grow from layer to layer,
    nor are they rounded to a few levels or cut off at one.
    """
    changed = copy.deepcopy(model)
    random = np.random.default_rng(0)
    names = set(parameters(model))
    filters_alone = _read_as_filters_alone(model)
    uniform = {
        tensor.name
        for tensor in changed.graph.initializer
        if tensor.name in filters_alone and np.prod(tensor.dims) >= _LARGE
    }
    # A mean of activations is what such a filter gives, and a larger bias would carry all of it beyond one.
    small = {node.input[2] for node in model.graph.node if len(node.input) > 2 and node.input[1] in uniform}
    lows = {node.input[1] for node in model.graph.node if node.op_type == "Clip" and len(node.input) > 1}
    numbers = (0.5 + i * _GOLDEN % 1 for i in itertools.count(1))
    del changed.metadata_props[:]  # which differ between the widths of one graph
    for tensor in changed.graph.initializer:
        if tensor.name in names:
            shape = tuple(tensor.dims)
            if tensor.name in uniform or np.prod(shape) == 1:  # two random ones may be too near
                value: npt.NDArray[Any] = np.array(next(numbers))
            else:
                value = random.random(shape, np.float32) + np.float32(0.5)
            if tensor.name.endswith(LEVELS_SUFFIX):
                value = value * _LEVELS
            elif tensor.name in lows:
                value = -value
            elif tensor.name in small:
                value = random.choice((-1, 1), shape) * value / 4
            elif tensor.name in uniform:
                value = value / np.prod(shape[1:])
            elif len(shape) > 1:
                value = random.choice((-1, 1), shape) * value / np.sqrt(np.prod(shape[1:]))
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, value, np.float32), tensor.name))
    return changed


def _read_as_filters_alone(model: onnx.ModelProto) -> set[str]:
    """The values that convolutions read as their filter, and that nothing reads otherwise."""
    uses = [(name, node.op_type == "Conv" and i == 1) for node in model.graph.node for i, name in enumerate(node.input)]
    return {name for name, _ in uses} - {name for name, as_filter in uses if not as_filter}


@dataclass(frozen=True)
class Product:
    """``parameter * gain * number / levels``, or with the reciprocal of the parameter.

    Attributes:
        parameter: Name of a parameter.
        operator: Name of the operator that reads the product as its filter; None for any other constant.
        axes: The axes of the parameter in another order, if they are moved.
        gain: Name of a parameter with a number for each output channel of the filter, or for each element.
        number: What no parameter has a part in.
        levels: Name of the number of steps of an activation quantiser.
        reciprocal: Whether it is the reciprocal of the parameter.
    """

    parameter: str
    operator: str | None = None
    axes: tuple[int, ...] | None = None
    gain: str | None = None
    number: float = 1.0
    levels: str | None = None
    reciprocal: bool = False

    def value(self, values: Mapping[str, Array], shape: Sequence[int]) -> Array:
        """The constant, float32 of a shape, that the parameters of a width make."""
        value = values[self.parameter]
        if self.reciprocal:
            value = np.reciprocal(value)
        if self.axes is not None:
            value = value.transpose(self.axes)
        layout = FILTER_OPERATORS[self.operator] if self.operator else None
        value = layout.from_torch(value, shape) if layout else value.reshape(shape)
        gains = self.gains(values)
        if gains is not None:
            value = value * (layout.per_channel(gains) if layout else gains.reshape(shape if self.gain else ()))
        return value if self.levels is None else np.divide(value, values[self.levels], dtype=np.float32)

    def gains(self, values: Mapping[str, Array]) -> Array | None:
        """Gain and number in one, float32, flat; None for 1."""
        if self.gain is None and self.number == 1:
            return None
        gain = np.ones(1, np.float32) if self.gain is None else values[self.gain].ravel()
        return gain * np.float32(self.number)


@dataclass(frozen=True)
class Sum:
    """``product + number``, ``product + parameter`` or ``product + filter @ parameter``.

    Attributes:
        product: None for 0.
        parameter: Name of a parameter.
        filter: What the parameter is multiplied by, and its shape.
        number: What no parameter has a part in.
    """

    product: Product | None
    parameter: str | None = None
    filter: tuple[Product, tuple[int, ...]] | None = None
    number: float = 0.0

    def value(self, values: Mapping[str, Array], shape: Sequence[int]) -> Array:
        """The constant, float32 of a shape, that the parameters of a width make."""
        value = np.full(shape, self.number, np.float32)
        if self.product is not None:
            value = value + self.product.value(values, shape)
        if self.parameter is None:
            return value
        added = values[self.parameter].ravel()
        if self.filter is not None:
            filter_, filter_shape = self.filter
            added = filter_.value(values, filter_shape) @ added
        return value + added.reshape(shape)


class Fingerprints:
    """What the constants of a file may be made of.

    Args:
        model: The network that was converted, with random parameters.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.parameters = parameters(model)
        self._levels = {name: value for name, value in self.parameters.items() if name.endswith(LEVELS_SUFFIX)}
        self._by_size: dict[int, dict[str, Array]] = {}
        for name, value in self.parameters.items():
            self._by_size.setdefault(value.size, {})[name] = value.ravel()
        self._of_operators = _of_operators(model)
        numbers = {float(abs(value.ravel()[0])) for value in self._of_operators if value.size == 1 and value.any()}
        self._numbers = np.array(sorted({1.0} | numbers | {1 / number for number in numbers}))
        self._products = np.outer(self._numbers, self._numbers).ravel()

    def is_of_operators(self, value: Array) -> bool:
        """Whether a constant of the file is of the operators alone, alike at every width."""
        if _is_plain(value) or (value.size == 1 and self._number(float(value.ravel()[0]))):
            return True
        same_size = (constant for constant in self._of_operators if constant.size == value.size)
        orders = (constant.transpose(axes) for constant in same_size for axes in permutations(range(constant.ndim)))
        return any(_equal(constant.ravel(), value.ravel()) for constant in orders)

    def filter(self, value: Array, operator: str) -> list[Product]:
        """Everything that a constant may be which an operator reads as its filter."""
        layout = FILTER_OPERATORS[operator]
        if alone := [*self._alone(value.transpose(layout.torch_axes).ravel(), operator)]:
            return alone
        rows = value.transpose(layout.axes).reshape(value.shape[layout.channel_axis], -1)
        products: list[Product] = []
        for name in self._by_size.get(value.size, ()):
            is_matrix = value.ndim == self.parameters[name].ndim == 2 and min(value.shape) > 1
            for axes in (None, (1, 0)) if is_matrix else (None,):
                candidate = Product(name, operator, axes)
                parameter = candidate.value(self.parameters, value.shape).transpose(layout.axes)
                gains = rows / parameter.reshape(rows.shape)
                if _is_uniform(gains).all():
                    products += self._times(candidate, gains[:, 0])
        return products

    def other(
        self, value: Array, filter_: Product | None = None, of_filter: Array | None = None
    ) -> Sequence[Product | Sum]:
        """Everything that any other constant may be.

        Args:
            value: The constant.
            filter_: If it is the bias of a linear layer, what the layer's filter is.
            of_filter: And the filter itself.
        """
        flat = value.ravel()
        alone = [*self._alone(flat, None)]
        if alone or flat.size < _TELLING or not np.isfinite(flat).all() or self.is_of_operators(value):
            return alone
        products: list[Product] = []
        for name, fingerprint in self._by_size.get(flat.size, {}).items():
            products += self._moved(name, flat)
            # The product of two parameters is met from both sides.
            times = self._times(Product(name), flat / fingerprint)
            products += [candidate for candidate in times if candidate.gain is None or candidate.gain > name]
        return products or [*self._sums(flat, filter_, of_filter)]

    def _alone(self, flat: Array, operator: str | None) -> Iterator[Product]:
        """The parameters that a constant may be, as they are or divided by a number of steps."""
        for name, fingerprint in self._by_size.get(flat.size, {}).items():
            if name in self._levels and _equal(flat, np.reciprocal(fingerprint)):
                yield Product(name, operator, reciprocal=True)
            if _equal(flat, fingerprint):
                yield Product(name, operator)
            if flat.size > 1:
                for levels, steps in self._levels.items():
                    if _equal(flat[:1], fingerprint[:1] / steps) and _equal(flat, fingerprint / steps):
                        yield Product(name, operator, levels=levels)

    def _moved(self, name: str, flat: Array) -> list[Product]:
        """A parameter in another order of axes; of orders that differ in axes of one element alone, the first."""
        parameter = self.parameters[name]
        orders = permutations(range(parameter.ndim)) if parameter.ndim > 1 else ()
        return [Product(name, axes=axes) for axes in orders if _equal(parameter.transpose(axes).ravel(), flat)][:1]

    def _times(self, candidate: Product, gains: Array) -> Iterator[Product]:
        """A candidate times so much in each output channel, or element; nothing where that is not explained."""
        if _is_uniform(gains[None])[0]:
            yield from self._times_number(candidate, float(gains[0]))
        elif gains.size >= _TELLING:
            names, starts = self._starts(gains.size)
            for place in np.flatnonzero(_is_uniform(gains[:_TELLING] / starts)):
                numbers = gains / self._by_size[gains.size][names[place]]
                if _is_uniform(numbers[None])[0]:
                    yield from self._times_number(replace(candidate, gain=names[place]), float(numbers[0]))

    def _times_number(self, candidate: Product, number: float) -> Iterator[Product]:
        if known := self._number(number):
            yield replace(candidate, number=known)
        for name, levels in self._levels.items():
            if known := _one_of(number * float(levels.ravel()[0]), self._numbers):
                yield replace(candidate, number=known, levels=name)

    def _sums(self, flat: Array, filter_: Product | None, of_filter: Array | None) -> Iterator[Sum]:
        """The sums that a constant may be. What the filter is multiplied with, the bias may be, too."""
        names, starts = self._starts(flat.size)
        ordinary = self._numbers[(self._numbers > _SMALL) & (self._numbers < 1 / _SMALL)]
        factors: set[tuple[str | None, float]] = {(None, number) for number in ordinary.tolist()}
        addends: list[tuple[str, tuple[Product, tuple[int, ...]] | None]] = [(name, None) for name in names]
        if filter_ is not None and of_filter is not None:
            factors |= {(filter_.gain, 1.0), (filter_.gain, filter_.number)}
            in_front = self._by_size.get(of_filter.shape[-1], {})
            addends += [(name, (filter_, of_filter.shape)) for name in in_front]
            starts = np.concatenate([starts, *([value @ of_filter[:_TELLING].T] for value in in_front.values())])
        products = [Product(name, gain=gain, number=number) for name in names for gain, number in factors]
        tolerance = _ROUNDING_OF_SUM * np.abs(flat).max()
        for first in (None, *products):
            rest = flat if first is None else flat - first.value(self.parameters, flat.shape)
            if first is not None and np.ptp(rest) <= tolerance and (number := self._number(float(rest[0]))):
                yield Sum(first, number=number)
            for place in np.flatnonzero(np.abs(starts - rest[:_TELLING]).max(1) <= tolerance):
                candidate = Sum(first, *addends[place])
                # The sum of two parameters is met from both sides.
                is_second = candidate.filter is None and first is not None and first.parameter > addends[place][0]
                if not is_second and np.abs(candidate.value(self.parameters, flat.shape) - flat).max() <= tolerance:
                    yield candidate

    def _starts(self, size: int) -> tuple[list[str], Array]:
        """The parameters of a size, and the first elements of each: (parameters, elements)."""
        same_size = self._by_size.get(size, {})
        starts = [value[:_TELLING] for value in same_size.values()]
        return [*same_size], np.array(starts, np.float32).reshape(len(starts), min(size, _TELLING))

    def _number(self, number: float) -> float:
        """The number of the operators alone that one is up to rounding: of one or two of theirs, a count or a fraction.

        0 where there is none.
        """
        size = abs(number)
        if not 0 < size < np.inf:
            return 0.0
        denominators = np.arange(1, _DENOMINATOR + 1)
        numerators = np.round(size * denominators)
        fractions = (numerators / denominators)[(numerators > 0) & (numerators <= _MOST_COUNTED)]
        counted = [1 / round(1 / size)] if 0.5 < 1 / size <= _MOST_COUNTED else []
        return _one_of(number, np.array([*fractions, *counted, *self._products]))


def _of_operators(model: onnx.ModelProto) -> list[Array]:
    """What operators have of their own, alike at every width: the scale of attention, the epsilon of LayerNorm."""
    constants = [
        numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name.startswith(CONSTANT_PREFIX)
    ]
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    return constants + [
        np.array([attribute.f], np.float32) for attribute in attributes if attribute.type == onnx.AttributeProto.FLOAT
    ]


def _equal(a: Array, b: Array) -> bool:
    """Whether two vectors agree up to rounding; most of those that do not differ at the start."""
    return bool(np.allclose(a[:16], b[:16], rtol=_ROUNDING, atol=0) and np.allclose(a, b, rtol=_ROUNDING, atol=0))


def _is_uniform(rows: Array) -> npt.NDArray[np.bool_]:
    """Whether each row has one number throughout, up to rounding."""
    uniform: npt.NDArray[np.bool_] = np.ptp(rows, axis=1) <= 2 * _ROUNDING * np.abs(rows).max(axis=1)
    return uniform


def _one_of(number: float, numbers: npt.NDArray[np.float64]) -> float:
    """That of some positive numbers which a number is up to rounding, with its sign; 0 where none is."""
    nearest = float(numbers[np.abs(numbers - abs(number)).argmin()])
    return math.copysign(nearest, number) if abs(nearest - abs(number)) <= _ROUNDING_OF_NUMBER * nearest else 0.0


def _is_plain(value: Array) -> bool:
    """Whether a constant holds short numbers (0, 1, 0.5) or infinities alone, which no fingerprint leads to."""
    with np.errstate(over="ignore"):
        is_short = (np.abs(value) < _LEVELS / 4) & (value * 1024 == np.round(value * 1024))
        return bool(np.all(is_short | (np.abs(value) > 1e30)))
