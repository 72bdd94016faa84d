"""The integer model as TFLite: int8 values and weights, int32 biases, channels last.

An activation quantiser is the fused ``RELU_N1_TO_1`` on a grid of scale ``1 / M_a`` and zero point -128. Runs in LiteRT
with XNNPACK or its reference kernels, and in TFLite Micro; the packed form (:mod:`.packing`) in TFLite Micro alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.onnx.file import INPUT_NAME, OUTPUT_NAME
from tqexport.backends.tflite.graph_builder import TFLiteGraph, activation_of, same_padding
from tqexport.backends.tflite.layout import LAYOUT
from tqexport.backends.tflite.packing import WIDEST, pack_filter
from tqexport.errors import ConversionError, UsageError
from tqexport.facts import ArtifactFacts, facts_of_model
from tqexport.integer.build import integer_model
from tqexport.integer.grids import OFFSET, Grid
from tqexport.integer.halves import halves_of, three_columns
from tqexport.integer.model import (
    Add,
    Average,
    Concat,
    Convolution,
    IntegerModel,
    Maximum,
    Operation,
    Requantize,
    Reshape,
    Window,
)
from tqexport.integer.names import FLOAT_IO, INTEGER, PACKED
from tqexport.integer.naming import INPUT
from tqexport.model import TruncModel

__all__ = ["check_packable", "integer_tflite", "render_tflite"]

_MOST_IN_LAYER = 1 << 8  # XNNPACK's limit
_MOST_IN_SUM = 1 << 19  # the limit of LiteRT's own kernel


def integer_tflite(model: TruncModel, bits: int, kernel: str = INTEGER, batch: int = 1) -> bytes:
    """Export a calibrated network at a width to integers.

    Args:
        model: See :func:`tqexport.integer.calibration.calibrate`.
        bits: The weight width.
        kernel: Which form: ``integer``; ``integer-float-io``, which takes and gives float32, with a QUANTIZE in front
            and a DEQUANTIZE behind; or ``integer-packed``, whose filters TFLite Micro unpacks as it runs.
        batch: How many samples the file takes at once.

    Returns:
        The file, for samples (batch, ..., C) channels last. int8 in and out unless the form says float.

    Raises:
        InputError: The checkpoint lacks the width, or a value has no grid.
        UsageError: The packed form was asked for at 8 bits.
        ConversionError: An operation has no integer form, or none in TFLite; or no filter is smaller when packed.
    """
    if kernel == PACKED:
        check_packable(bits)
    return render_tflite(integer_model(model, bits), facts_of_model(model, bits, LAYOUT, kernel), batch)


def render_tflite(network: IntegerModel, facts: ArtifactFacts, batch: int) -> bytes:
    """The file of an integer model for so many samples at once, which says ``facts`` of itself.

    The kernel of the facts is the form that is written.

    Raises:
        ConversionError: An operation has no form in TFLite; or no filter is smaller when packed.
    """
    writer = _Writer(network, facts.kernel, batch)
    for operation in network.operations:
        writer.add(operation)
    return writer.finish(facts)


def check_packable(bits: int) -> None:
    """Refuse to pack weights of 8 bits.

    Raises:
        UsageError: They are.
    """
    if bits > WIDEST:
        raise UsageError(
            f"weights of 8 bits cannot be packed; name widths of 1 to {WIDEST} bits, as in --bits 1-{WIDEST}, or "
            "export 8 bits with --kernel integer"
        )


class _Writer:
    def __init__(self, network: IntegerModel, kernel: str | None, batch: int) -> None:
        self._batch = batch
        self._network, self._packs, self._float_io = network, kernel == PACKED, kernel == FLOAT_IO
        self._packed = 0  # filters
        self._graph = TFLiteGraph()
        shape = self._channels_last(network.shapes[INPUT])
        grid = network.grids[INPUT]
        outside = (
            [batch, *shape[-2:]] if len(network.shapes[INPUT]) == 2 else shape
        )  # as files without integers have it
        self._input = self._graph.value(INPUT_NAME, outside, None if self._float_io else grid)
        read = self._input
        if self._float_io:
            read = self._graph.operator("QUANTIZE", [read], self._graph.value("input/int8", outside, grid), version=1)
        self._values = {INPUT: read if outside == shape else self._reshaped(read, "input/2d", shape, grid)}

    def add(self, operation: Operation) -> None:
        """Write one operation."""
        graph, output = self._graph, operation.output
        inputs = [self._values[name] for name in operation.inputs]
        grid = self._network.grids[output]
        shape = self._channels_last(self._network.shapes[output])
        if isinstance(operation, Reshape):
            self._values[output] = self._reshape(operation, inputs[0], shape, grid)
            return
        if isinstance(operation, Average):
            self._values[output] = self._average(operation, inputs[0], shape, grid)
            return
        computed = graph.value(output, shape, grid)
        match operation:
            case Convolution():
                self._convolution(operation, inputs[0], computed, grid)
            case Add():
                steps = [self._network.grids[name].scale / grid.scale for name in operation.inputs]
                _check_factor(operation.name, max(steps), _MOST_IN_SUM)
                options = schema.AddOptionsT()
                options.fusedActivationFunction = activation_of(grid)
                graph.operator("ADD", inputs, computed, options)
            case Concat():
                self._concat(inputs, computed, len(shape) - 1)
            case Maximum():
                self._maximum(operation, inputs[0], computed)
            case Requantize():
                graph.operator("QUANTIZE", inputs, computed)
            case _:
                raise ConversionError(f"{operation.name} has no TFLite form")
        self._values[output] = computed

    def finish(self, facts: ArtifactFacts) -> bytes:
        """The file.

        Raises:
            ConversionError: It was to be packed, and no filter is.
        """
        if self._packs and not self._packed:
            raise ConversionError(
                f"no layer is smaller when its weights of {self._network.bits} bits are packed; use --kernel integer"
            )
        result = self._values[self._network.output]
        if self._float_io:
            result = self._graph.operator(
                "DEQUANTIZE", [result], self._graph.value(OUTPUT_NAME, self._graph.shape(result), None)
            )
        return self._graph.pack(self._input, result, facts)

    def _convolution(self, layer: Convolution, read: int, output: int, grid: Grid) -> None:
        """Write a convolution or linear layer."""
        source, window, groups, weight = layer.inputs[0], layer.window, layer.groups, layer.weight.astype(np.int8)
        if layer.wide:
            weight = halves_of(layer).weight
            read, window = self._copies(layer, read, window)
        unit = np.float32(self._network.grids[source].scale) * layer.scale
        _check_factor(layer.name, float(unit.max()) / grid.scale, _MOST_IN_LAYER)
        bias = self._graph.weight(f"{layer.name}.bias", layer.bias, unit, 0)
        if window is None:
            options = schema.FullyConnectedOptionsT()
            options.fusedActivationFunction = activation_of(grid)
            filters = self._filter(layer, weight, 0)
            self._graph.operator("FULLY_CONNECTED", [read, filters, bias], output, options, version=4)
            return
        planar = window.planar
        weight = weight.reshape(*weight.shape[:2], *planar.kernel)
        same = self._is_same(read, planar)
        if not same:
            read = self._padded(layer.name, read, planar, None)
        channels = weight.shape[1] * groups
        depthwise = groups > 1 and weight.shape[1] == 1 and groups == channels
        options = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
        options.padding = schema.Padding.SAME if same else schema.Padding.VALID
        options.strideH, options.strideW = planar.stride
        options.dilationHFactor, options.dilationWFactor = planar.dilation
        options.fusedActivationFunction = activation_of(grid)
        if depthwise:
            options.depthMultiplier = weight.shape[0] // groups
            filters = self._filter(layer, weight.transpose(1, 2, 3, 0), 3)
            self._graph.operator("DEPTHWISE_CONV_2D", [read, filters, bias], output, options, version=3)
        else:
            filters = self._filter(layer, weight.transpose(0, 2, 3, 1), 0)
            self._graph.operator("CONV_2D", [read, filters, bias], output, options, version=3)

    def _filter(self, layer: Convolution, weight: npt.NDArray[np.int8], axis: int) -> int:
        """Add a layer's weights, packed where that is asked for and smaller, for the operator that is added next."""
        name = f"{layer.name}.weight"
        packed = pack_filter(name, weight) if self._packs else None
        if packed is None:
            return self._graph.weight(name, weight, layer.scale, axis)
        self._packed += 1
        return self._graph.packed_weight(name, weight.shape, packed, layer.scale, axis)

    def _copies(self, layer: Convolution, read: int, window: Window | None) -> tuple[int, Window | None]:
        """What a layer of nine-bit weights reads instead of its input, see :mod:`tqexport.integer.halves`."""
        graph, shape, grid = self._graph, self._graph.shape(read), self._network.grids[layer.inputs[0]]
        if layer.groups > 1:
            assert window is not None
            thrice = graph.value(f"{layer.name}/copies", [*shape[:-1], 3 * shape[-1]], grid)
            self._concat([read] * 3, thrice, len(shape) - 1)
            columns = [*shape[:-2], 3 * shape[-2], shape[-1]]
            return self._reshaped(thrice, f"{layer.name}/columns", columns, grid), three_columns(layer.name, window)
        pieces = [read, read]
        for run in halves_of(layer).extra:
            if run == range(shape[-1]):
                pieces.append(read)
                continue
            size, begin = [*shape[:-1], len(run)], [*[0] * (len(shape) - 1), run.start]
            cut = graph.value(f"{layer.name}/channels{run.start}", size, grid)
            ends = [graph.integers(*begin), graph.integers(*size)]
            pieces.append(graph.operator("SLICE", [read, *ends], cut, schema.SliceOptionsT()))
        channels = sum(graph.shape(piece)[-1] for piece in pieces)
        joined = graph.value(f"{layer.name}/copies", [*shape[:-1], channels], grid)
        self._concat(pieces, joined, len(shape) - 1)
        return joined, window

    def _average(self, operation: Average, read: int, shape: Sequence[int], grid: Grid) -> int:
        """The mean without the axes of space; LiteRT keeps them by another arithmetic."""
        options = schema.ReducerOptionsT()
        options.keepDims = False
        name = f"{operation.output}/flat" if operation.keep else operation.output
        flat = self._graph.value(name, [self._batch, shape[-1]], grid)
        self._graph.operator("MEAN", [read, self._graph.integers(1, 2)], flat, options)
        return self._reshaped(flat, operation.output, shape, grid) if operation.keep else flat

    def _maximum(self, operation: Maximum, read: int, output: int) -> None:
        """Write a maximum over windows."""
        planar = operation.window.planar
        if planar.dilation != (1, 1):
            raise ConversionError(f"{operation.name} is dilated; TFLite has no such maximum")
        same = self._is_same(read, planar)
        if not same:
            read = self._padded(operation.name, read, planar, -OFFSET)
        options = schema.Pool2DOptionsT()
        options.padding = schema.Padding.SAME if same else schema.Padding.VALID
        options.strideH, options.strideW = planar.stride
        options.filterHeight, options.filterWidth = planar.kernel
        self._graph.operator("MAX_POOL_2D", [read], output, options)

    def _is_same(self, read: int, window: Window) -> bool:
        """Whether TFLite's SAME is this padding."""
        sizes = self._graph.shape(read)[1:3]
        return any(any(pair) for pair in window.padding) and all(
            same_padding(size, kernel, stride, dilation) == (before, _needed(size, kernel, stride, dilation, pair))
            for size, kernel, stride, dilation, pair in _axes(sizes, window)
            for before in pair[:1]
        )

    def _padded(self, name: str, read: int, window: Window, fill: int | None) -> int:
        """A value extended by zeros, or by ``fill``, as far as the windows reach."""
        shape = self._graph.shape(read)
        before = [pair[0] for pair in window.padding]
        after = [
            _needed(size, kernel, stride, dilation, pair)
            for size, kernel, stride, dilation, pair in _axes(shape[1:3], window)
        ]
        if not any(before) and not any(after):
            return read
        extents = np.array([[0, 0], [before[0], after[0]], [before[1], after[1]], [0, 0]], np.int32)
        grown = [shape[0], *(size + b + a for size, b, a in zip(shape[1:3], before, after, strict=True)), shape[3]]
        source = self._graph.flat.tensor(read).quantization
        grid = Grid(float(source.scale[0]), int(source.zeroPoint[0]) + OFFSET)
        output = self._graph.value(f"{name}/padded", grown, grid)
        inputs = [read, self._graph.matrix(extents)]
        if fill is None:
            return self._graph.operator("PAD", inputs, output, schema.PadOptionsT())
        least = self._graph.value(f"{name}/least", [1], grid)
        self._graph.flat.set_constant(least, np.array([fill], np.int8))
        return self._graph.operator("PADV2", [*inputs, least], output, schema.PadV2OptionsT())

    def _concat(self, inputs: Sequence[int], output: int, axis: int) -> None:
        options = schema.ConcatenationOptionsT()
        options.axis = axis
        self._graph.operator("CONCATENATION", inputs, output, options)

    def _reshape(self, operation: Reshape, read: int, shape: Sequence[int], grid: Grid) -> int:
        """The same levels in another shape; PyTorch's order is channels first."""
        before = self._graph.shape(read)
        if len(before) == 4 and int(np.prod(before[1:3])) > 1:
            order = (0, 3, 1, 2)
            moved = self._graph.value(f"{operation.name}/channels_first", [before[i] for i in order], grid)
            read = self._graph.operator(
                "TRANSPOSE", [read, self._graph.integers(*order)], moved, schema.TransposeOptionsT()
            )
        if len(shape) == 4 and int(np.prod(shape[1:3])) > 1:
            raise ConversionError(f"{operation.name} reshapes to several rows and columns; it has no TFLite form yet")
        return self._reshaped(read, operation.output, shape, grid)

    def _channels_last(self, shape: Sequence[int]) -> list[int]:
        """A sample's shape (C, ...) as TFLite has it for a batch, a single spatial axis as a row."""
        space = list(shape[1:])
        if len(space) > 2:
            raise ConversionError(f"values of shape {tuple(shape)} have no TFLite form; up to two spatial axes have")
        return [self._batch, *([1] * (len(space) == 1)), *space, shape[0]]

    def _reshaped(self, read: int, name: str, shape: Sequence[int], grid: Grid) -> int:
        options = schema.ReshapeOptionsT()
        options.newShape = np.array(shape, np.int32)
        output = self._graph.value(name, shape, grid)
        return self._graph.operator("RESHAPE", [read, self._graph.integers(*shape)], output, options, version=1)


def _check_factor(name: str, factor: float, most: int) -> None:
    """Refuse what LiteRT refuses when it loads the file, or, at a sum, ends the process for."""
    if factor >= most:
        raise ConversionError(
            f"one step of what {name} reads makes {factor:.3g} steps of its output, and LiteRT takes less than {most}; "
            "calibrate on samples that are normalised as in training"
        )


def _axes(sizes: Sequence[int], window: Window) -> list[tuple[int, int, int, int, tuple[int, int]]]:
    return list(zip(sizes, window.kernel, window.stride, window.dilation, window.padding, strict=True))


def _needed(size: int, kernel: int, stride: int, dilation: int, padding: tuple[int, int]) -> int:
    """How much of the padding behind an axis the last window reaches."""
    reach = dilation * (kernel - 1) + 1
    steps = (size + sum(padding) - reach) // stride
    return max(0, steps * stride + reach - size - padding[0])
