"""The integer model of a network at one width: where its integer arithmetic is defined, exactly, in numpy.

Back ends render it, verification runs it. Values are levels 0 to 255 of their grids; files with int8 values hold the
same levels less 128. Sums are those of int32, which no layer here can overflow unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError
from tqexport.integer.arithmetic import Rounding, add, average, move, requantize, to_grid
from tqexport.integer.grids import Grid
from tqexport.integer.naming import INPUT
from tqexport.integer.weights import LARGEST, Codes
from tqexport.integer.windows import convolve, maximum

__all__ = [
    "Add",
    "Average",
    "Concat",
    "Convolution",
    "IntegerModel",
    "Maximum",
    "Operation",
    "Requantize",
    "Reshape",
    "Window",
]

Levels = npt.NDArray[np.uint8]

_INT16 = 32767
_DEPTHWISE_BLOCK = 8  # channels that LiteRT's depthwise kernel computes at once; those that are left, one by one


@dataclass(frozen=True)
class Window:
    """How a kernel moves over space, one entry per axis.

    Attributes:
        kernel: Its size.
        stride: Its step.
        padding: How far the input is extended, (before, after).
        dilation: The distance between its elements.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def planar(self) -> Window:
        """The same window over two axes; a single axis is a row."""
        if len(self.kernel) == 2:
            return self
        return Window((1, *self.kernel), (1, *self.stride), ((0, 0), *self.padding), (1, *self.dilation))


@dataclass(frozen=True)
class Operation:
    """What all operations have.

    Attributes:
        name: Of the layer in the PyTorch network.
        inputs: Values that it reads.
        output: The value that it computes.
    """

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution, or a linear layer, which has no space.

    Attributes:
        unsigned: int16 (out, in / groups, *kernel): -127 to 127, or -255 to 255.
        scale: float32 (out,), of the weights, gain included.
        bias: int32 (out,), in units of ``input scale * scale``.
        window: None for a linear layer.
        groups: As in PyTorch.
        codes: Where a quantised layer's weights come from; None for float layers and pools.
        signs: int8 (out,): what ``unsigned`` is multiplied with: -1 for a negative gain, 0 where the bias is all.
    """

    unsigned: npt.NDArray[np.int16]
    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.int32]
    window: Window | None
    groups: int
    codes: Codes | None
    signs: npt.NDArray[np.int8]

    @property
    def weight(self) -> npt.NDArray[np.int16]:
        """int16 (out, in / groups, *kernel): what the input is multiplied with."""
        return self.unsigned * self.signs.astype(np.int16).reshape(-1, *[1] * (self.unsigned.ndim - 1))

    @property
    def wide(self) -> bool:
        """Whether the weights need nine bits."""
        return self.codes is not None and self.codes.wide


@dataclass(frozen=True)
class Add(Operation):
    """The sum of two values of one shape."""


@dataclass(frozen=True)
class Concat(Operation):
    """Values of one grid side by side along the channels."""


@dataclass(frozen=True)
class Average(Operation):
    """The mean over all of space.

    Attributes:
        keep: Whether the axes stay, with size 1.
    """

    keep: bool


@dataclass(frozen=True)
class Maximum(Operation):
    """The greatest level in each window; levels outside of the input do not count."""

    window: Window


@dataclass(frozen=True)
class Reshape(Operation):
    """The same levels in another shape."""


@dataclass(frozen=True)
class Requantize(Operation):
    """The same value on another grid."""


@dataclass(frozen=True)
class IntegerModel:
    """A network at one width.

    Attributes:
        bits: The weight width.
        operations: In the order they run.
        grids: By value, the input included.
        shapes: By value, of one sample, channels first.
        output: The value that the network returns.
        quantized: The values that have the levels of an activation quantiser, by which width ever.
    """

    bits: int
    operations: tuple[Operation, ...]
    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, ...]]
    output: str
    quantized: frozenset[str] = frozenset()

    def run(self, inputs: npt.NDArray[np.float32], rounding: Rounding = "real") -> dict[str, Levels]:
        """Run the network.

        Args:
            inputs: float32 (N, *input_shape), normalised.
            rounding: Of which runtime, see :mod:`tqexport.integer.arithmetic`.

        Returns:
            Every value as uint8 levels (N, ...), channels first.

        Raises:
            InputError: The samples have another shape.
        """
        if inputs.shape[1:] != self.shapes[INPUT]:
            raise InputError(f"the network takes samples of shape {self.shapes[INPUT]}, not {inputs.shape[1:]}")
        values = {INPUT: to_grid(inputs, self.grids[INPUT])}
        for operation in self.operations:
            values[operation.output] = self.compute(operation, values, rounding)
        return values

    def compute(self, operation: Operation, values: Mapping[str, Levels], rounding: Rounding) -> Levels:
        """One operation's output from its inputs, uint8 levels (N, ...), channels first."""
        inputs = [values[name] for name in operation.inputs]
        sources = [self.grids[name] for name in operation.inputs]
        target = self.grids[operation.output]
        shape = (len(inputs[0]), *self.shapes[operation.output])
        match operation:
            case Convolution():
                return _convolution(operation, inputs[0], sources[0], target, rounding)
            case Add():
                return add(inputs[0], sources[0], inputs[1], sources[1], target, rounding)
            case Average():
                space = tuple(range(2, inputs[0].ndim))
                count = int(np.prod(inputs[0].shape[2:]))
                sums = inputs[0].astype(np.int64).sum(space) - count * sources[0].zero_point
                return average(sums, count, sources[0], target, rounding).reshape(shape)
            case Concat():
                return np.concatenate(inputs, 1)
            case Maximum():
                return maximum(inputs[0], operation.window)
            case Reshape():
                return inputs[0].reshape(shape)
            case Requantize():
                return move(inputs[0], sources[0], target, rounding)
        raise TypeError(f"{type(operation).__name__} is no operation of the integer model")

    def beyond_int16(self) -> tuple[str, ...]:
        """Layers in which two products may exceed 16 bits together, by name.

        x86 processors without VNNI add products in pairs and saturate there: onnxruntime is wrong on them where both
        weights and values are large. Quantised layers of up to 7 bits with activations as wide stay below.
        """
        return tuple(
            layer.name
            for layer in self.operations
            if isinstance(layer, Convolution)
            if 2 * self.grids[layer.inputs[0]].high * min(int(np.abs(layer.unsigned).max()), LARGEST) > _INT16
        )

    def to_floats(self, name: str, levels: Levels) -> npt.NDArray[np.float32]:
        """What the levels of a value stand for, float32, same shape."""
        grid = self.grids[name]
        return (levels.astype(np.float32) - np.float32(grid.zero_point)) * np.float32(grid.scale)


def _convolution(layer: Convolution, inputs: Levels, source: Grid, target: Grid, rounding: Rounding) -> Levels:
    x = inputs.astype(np.float64) - source.zero_point  # whole numbers, far below 2^53
    if layer.window is None:
        sums = x @ layer.weight.astype(np.float64).T
    else:
        sums = convolve(x, layer.weight.astype(np.float64), layer.window, layer.groups)
    wide = (1, -1, *[1] * (sums.ndim - 2))
    whole = sums.astype(np.int64) + layer.bias.astype(np.int64).reshape(wide)
    scale = layer.scale.reshape(wide)
    levels = requantize(whole, source.scale, scale, target, rounding)
    if rounding == "litert" and layer.groups > 1:
        # LiteRT's kernel for several groups is that of TFLite Micro, and so is the end of its depthwise kernel.
        depthwise = layer.unsigned.shape[1] == 1
        first = len(layer.scale) // _DEPTHWISE_BLOCK * _DEPTHWISE_BLOCK if depthwise else 0
        levels[:, first:] = requantize(whole, source.scale, scale, target, "tflm")[:, first:]
    return levels
