"""The integer model as ONNX: QDQ that onnxruntime fuses into integer kernels, the codes and their shift explicit.

Every value is a QuantizeLinear and a DequantizeLinear with uint8 levels; a quantiser of fewer than 8 bits is a Clip of
the levels between them. Weights are ``codes >> shift``, doubled, less ``M_b``, times a sign and a whole number, as int8
with a scale for each output channel. onnxruntime folds that chain when it loads the file.

Two forms of the kernel hold the int8 weights themselves, for compilers that fold nothing. One of these, the symmetric
form, is for compilers whose int8 has no zero point, such as TensorRT: values are int8 with zero in the middle, and
biases are floats, because there only int8 is de-quantised.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tqexport.backends.onnx import LAYOUT
from tqexport.backends.onnx.file import BATCH, INPUT_NAME, OUTPUT_NAME
from tqexport.backends.onnx.graph_builder import GraphBuilder
from tqexport.backends.onnx.packing import pack_onnx
from tqexport.errors import ConversionError, InputError
from tqexport.facts import ArtifactFacts, facts_of_model
from tqexport.integer.build import integer_model
from tqexport.integer.grids import HIGHEST, OFFSET, Grid
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
)
from tqexport.integer.names import FOLDED, INTEGER, PACKED, SYMMETRIC
from tqexport.integer.naming import INPUT
from tqexport.integer.weights import LARGEST, Codes
from tqexport.model import TruncModel

__all__ = ["LEVELS", "MOST_IN_FLOAT", "integer_onnx", "render_onnx"]

_log = logging.getLogger(__name__)

LEVELS = ":levels"  # suffix of a value's levels in the file
MOST_IN_FLOAT = 1 << 21  # of a bias whose quotient by its unit is surely rounded back to the whole number it was
_MEAN_RATIOS = (2.0**-32, 2.0**8)  # what onnxruntime's mean of integers takes, of grids and number of values


def integer_onnx(model: TruncModel, bits: int, kernel: str = INTEGER, batch: int | None = None) -> bytes:
    """Export a calibrated network at a width to integers.

    Args:
        model: See :func:`tqexport.integer.calibration.calibrate`.
        bits: The weight width.
        kernel: ``integer``, ``integer-packed``, ``integer-folded``, or ``integer-symmetric``, which needs a network
            that was calibrated ``symmetric`` and activations of 7 bits at most.
        batch: How many samples it takes at once; None for any number.

    Returns:
        The serialised, checked ONNX file: float32 in and out, everything between in integers.

    Raises:
        InputError: The checkpoint lacks the width, a value has no grid, or one with a zero point in symmetric form.
        ConversionError: An operation has no integer form.
    """
    network = integer_model(model, bits)
    if layers := network.beyond_int16():
        more = f" and {len(layers) - 3} more layers" if len(layers) > 3 else ""
        _log.warning(
            "at %d bits, x86 processors without VNNI may saturate in %s: they add products in pairs of 16 bits",
            bits,
            ", ".join(layers[:3]) + more,
        )
    return render_onnx(network, facts_of_model(model, bits, LAYOUT, kernel), batch)


def render_onnx(network: IntegerModel, facts: ArtifactFacts, batch: int | None = None, *, fused: bool = False) -> bytes:
    """The file of an integer model.

    Args:
        network: The model.
        facts: What the file says of itself; their kernel is the form that is written.
        fused: Write convolutions as QLinearConv, which onnxruntime does not make of scales that are no constants.

    Raises:
        InputError: A value has a zero point that the symmetric form does not hold.
        ConversionError: An operation has no integer form in onnxruntime.
    """
    if facts.kernel == SYMMETRIC:
        _check_symmetric(network)
    writer = _Writer(network, facts.kernel, batch, fused)
    for operation in network.operations:
        writer.add(operation)
    if facts.kernel == PACKED:
        return pack_onnx(writer.finish(replace(facts, kernel=INTEGER)))
    return writer.finish(facts)


class _Writer:
    """Writes values as pairs: ``NAME:levels`` in uint8 or int8 and ``NAME`` in float."""

    def __init__(self, network: IntegerModel, kernel: str | None, batch: int | None, fused: bool) -> None:
        self._network, self._fused, self._batch = network, fused, batch or BATCH
        self._folded, self._symmetric = kernel in (FOLDED, SYMMETRIC), kernel == SYMMETRIC
        self._levels = np.int8 if self._symmetric else np.uint8
        # Of two roundings in a row onnxruntime makes one, unless something stands between them.
        self._limited = network.quantized | {move.output for move in network.operations if isinstance(move, Requantize)}
        self._graph = GraphBuilder()
        self._graph.input(INPUT_NAME, (self._batch, *network.shapes[INPUT]))
        self._floats: dict[str, str] = {}
        self._store(INPUT, INPUT_NAME)

    def add(self, operation: Operation) -> None:
        """Write one operation."""
        inputs = [self._floats[name] for name in operation.inputs]
        output = operation.output
        match operation:
            case Convolution():
                self._convolution(operation)
                return
            case Add():
                computed = self._graph.node("Add", inputs, f"{output}:float")
            case Concat():
                computed = self._graph.node("Concat", inputs, f"{output}:float", axis=1)
            case Average():
                _check_mean(operation, self._network)
                computed = self._graph.node("GlobalAveragePool", inputs, f"{output}:float")
                if not operation.keep:
                    self._store(f"{output}:pooled", computed, self._network.grids[output])
                    self._reshape(output, f"{output}:pooled{LEVELS}")
                    return
            case Maximum():
                window = operation.window
                levels = self._graph.node(
                    "MaxPool",
                    [operation.inputs[0] + LEVELS],
                    output + LEVELS,
                    kernel_shape=window.kernel,
                    strides=window.stride,
                    pads=_pads(window.padding),
                    dilations=window.dilation,
                )
                self._read(output, levels, self._network.grids[output])
                return
            case Reshape():
                self._reshape(output, operation.inputs[0] + LEVELS)
                return
            case Requantize():
                computed = inputs[0]
            case _:
                raise TypeError(f"{type(operation).__name__} has no ONNX form")
        self._store(output, computed)

    def finish(self, facts: ArtifactFacts) -> bytes:
        """The file."""
        self._graph.node("Identity", [self._floats[self._network.output]], OUTPUT_NAME)
        return self._graph.model((self._batch, *self._network.shapes[self._network.output]), facts)

    def _store(self, name: str, computed: str, grid: Grid | None = None) -> None:
        """Round a float value to its grid."""
        grid = grid or self._network.grids[name]
        inputs = [computed, *self._grid(name, grid)]
        self._limit(name, self._graph.node("QuantizeLinear", inputs, self._unlimited(name, grid)), grid)

    def _unlimited(self, name: str, grid: Grid) -> str:
        """The name of a value's levels before they are limited to those of an activation quantiser."""
        narrow = grid.low > 0 or grid.high < HIGHEST or name in self._limited
        return f"{name}:quantized" if narrow else name + LEVELS

    def _limit(self, name: str, levels: str, grid: Grid) -> None:
        if levels != name + LEVELS:
            zero = grid.zero_point if self._symmetric else 0
            low = self._graph.constant(f"{name}:low", self._levels(grid.low - zero))
            high = self._graph.constant(f"{name}:high", self._levels(grid.high - zero))
            levels = self._graph.node("Clip", [levels, low, high], name + LEVELS)
        self._read(name, levels, grid)

    def _read(self, name: str, levels: str, grid: Grid) -> None:
        self._floats[name] = self._graph.node("DequantizeLinear", [levels, *self._grid(name, grid)], name + ":value")

    def _grid(self, name: str, grid: Grid) -> tuple[str, str]:
        scale = self._graph.constant(f"{name}:scale", np.float32(grid.scale))
        zero = 0 if self._symmetric else grid.zero_point
        return scale, self._graph.constant(f"{name}:zero_point", self._levels(zero))

    def _reshape(self, output: str, levels: str) -> None:
        target = np.array([-1, *self._network.shapes[output]], np.int64)
        shape = self._graph.constant(f"{output}:shape", target)
        self._read(output, self._graph.node("Reshape", [levels, shape], output + LEVELS), self._network.grids[output])

    def _convolution(self, layer: Convolution) -> None:
        """Write a convolution or linear layer, its weights from codes and shift."""
        g, source, window, groups = self._graph, layer.inputs[0], layer.window, layer.groups
        read, levels = self._floats[source], source + LEVELS
        extra: tuple[range, ...] = ()
        if layer.wide:
            extra = halves_of(layer).extra
            read, levels = self._copies(layer, source, extra)
            if groups > 1 and window is not None:
                window = three_columns(layer.name, window)
        source_grid, grid = self._network.grids[source], self._network.grids[layer.output]
        scale = g.constant(f"{layer.name}.scale", layer.scale)
        # Without its zero points onnxruntime leaves a Gemm in float.
        zeros = g.constant(f"constant/zeros{len(layer.scale)}", np.zeros(len(layer.scale), np.int8))
        weight = self._weight(layer, extra)
        attributes: dict[str, Any] = {"transB": 1}
        if window is not None:
            attributes = {
                "kernel_shape": window.kernel,
                "strides": window.stride,
                "pads": _pads(window.padding),
                "dilations": window.dilation,
                "group": groups,
            }
        if self._fused and window is not None:
            target = self._grid(layer.output, grid)
            bias = g.constant(f"{layer.name}.bias_integers", layer.bias)
            inputs = [levels, *self._grid(source, source_grid), weight, scale, zeros, *target, bias]
            levels = g.node("QLinearConv", inputs, self._unlimited(layer.output, grid), **attributes)
            self._limit(layer.output, levels, grid)
            return
        weight = g.node("DequantizeLinear", [weight, scale, zeros], f"{layer.name}.weight", axis=0)
        bias = self._bias(layer, source_grid)
        kind = "Gemm" if window is None else "Conv"
        self._store(layer.output, g.node(kind, [read, weight, bias], f"{layer.output}:float", **attributes))

    def _bias(self, layer: Convolution, source: Grid) -> str:
        """float32 (out,), of whole numbers."""
        unit = np.float32(source.scale) * layer.scale
        if self._symmetric:
            return self._graph.constant(f"{layer.name}.bias", layer.bias.astype(np.float32) * unit)
        whole = self._graph.constant(f"{layer.name}.bias_integers", layer.bias)
        scale = self._graph.constant(f"{layer.name}.bias_scale", unit)
        return self._graph.node("DequantizeLinear", [whole, scale], f"{layer.name}.bias", axis=0)

    def _weight(self, layer: Convolution, extra: Sequence[range]) -> str:
        """int8, the shape that the layer multiplies with."""
        name, g, codes = f"{layer.name}.weight", self._graph, layer.codes
        if self._folded:
            values = halves_of(layer).weight if layer.wide else layer.weight.astype(np.int8)
            return g.constant(f"{name}.integers", values)
        if codes is None:
            # Times the signs in the graph, as these may differ between the widths of one file.
            unsigned = g.constant(f"{name}.unsigned", layer.unsigned.astype(np.int8))
            odd, multiplier = g.node("Cast", [unsigned], f"{name}.whole", to=_INT32), 1
        else:
            stored, shift = g.constant(f"{name}.codes", codes.codes), g.constant(f"{name}.shift", np.uint8(codes.shift))
            shifted = g.node("BitShift", [stored, shift], f"{name}.shifted", direction="RIGHT")
            if self._fused:
                return self._by_quantizing(layer, codes, shifted)
            whole = g.node("Cast", [shifted], f"{name}.whole", to=_INT32)
            doubled = g.node("Add", [whole, whole], f"{name}.doubled")
            odd = g.node("Sub", [doubled, g.constant(f"{name}.highest", np.int32(codes.highest))], f"{name}.odd")
            multiplier = codes.multiplier
        factors = g.constant(f"{name}.factors", layer.signs.astype(np.int32) * multiplier)
        column = np.array([-1, *[1] * (layer.weight.ndim - 1)], np.int64)
        shape = g.constant(f"constant/column{layer.weight.ndim}", column)
        levels = g.node("Mul", [odd, g.node("Reshape", [factors, shape], f"{name}.signs")], f"{name}.levels")
        if not layer.wide:
            return g.node("Cast", [levels], f"{name}.integers", to=_INT8)
        first = g.node("Div", [levels, g.constant("constant/two", np.int32(2))], f"{name}.first")
        rest = g.node("Sub", [levels, first], f"{name}.rest")
        ends = [g.constant(f"constant/{end}", np.int32(end)) for end in (-LARGEST, LARGEST)]
        second = g.node("Clip", [rest, *ends], f"{name}.second")
        third = g.node("Sub", [rest, second], f"{name}.third")
        if layer.groups > 1:
            return self._in_columns(layer, [first, second, third])
        pieces = [first, second]
        pieces += [self._channels(third, f"{name}.third{run.start}", run) for run in extra]
        joined = g.node("Concat", pieces, f"{name}.joined", axis=1)
        return g.node("Cast", [joined], f"{name}.integers", to=_INT8)

    def _by_quantizing(self, layer: Convolution, codes: Codes, shifted: str) -> str:
        """``factor * (2 u - M_b)`` as a dequantisation and a quantisation: exact, and faster where it is not folded.

        The first multiplies by ``2 factor``, the second adds its zero point ``-factor M_b``; both are whole numbers.
        """
        g, name, channels = self._graph, f"{layer.name}.weight", len(layer.signs)
        factors = layer.signs.astype(np.int32) * codes.multiplier
        zeros = g.constant(f"constant/bytes{channels}", np.zeros(channels, np.uint8))
        steps = g.constant(f"{name}.steps", (2 * factors).astype(np.float32))
        lowest = g.constant(f"{name}.lowest", (-factors * codes.highest).astype(np.int8))
        ones = g.constant(f"constant/ones{channels}", np.ones(channels, np.float32))
        scaled = g.node("DequantizeLinear", [shifted, steps, zeros], f"{name}.scaled", axis=0)
        return g.node("QuantizeLinear", [scaled, ones, lowest], f"{name}.integers", axis=0)

    def _channels(self, source: str, name: str, channels: range) -> str:
        """A range of axis 1."""
        ends = (channels.start, channels.stop, 1)
        inputs = [self._graph.constant(f"constant/index{end}", np.array([end], np.int64)) for end in ends]
        return self._graph.node("Slice", [source, *inputs], name)

    def _in_columns(self, layer: Convolution, pieces: list[str]) -> str:
        """The three parts of each weight side by side in the last axis of the kernel."""
        g, name, rank = self._graph, f"{layer.name}.weight", layer.weight.ndim
        last = g.constant(f"constant/axis{rank}", np.array([rank], np.int64))
        columns = [g.node("Unsqueeze", [piece, last], f"{piece}_column") for piece in pieces]
        joined = g.node("Concat", columns, f"{name}.joined", axis=rank)
        shape = [*layer.weight.shape[:-1], 3 * layer.weight.shape[-1]]
        flat = g.node("Reshape", [joined, g.constant(f"{name}.shape", np.array(shape, np.int64))], f"{name}.flat")
        return g.node("Cast", [flat], f"{name}.integers", to=_INT8)

    def _copies(self, layer: Convolution, source: str, extra: Sequence[range]) -> tuple[str, str]:
        """What a wide layer reads instead of its input: the floats, and their levels."""
        g, levels, grid = self._graph, source + LEVELS, self._network.grids[source]
        stem = f"{layer.name}/copies"
        if layer.groups == 1:
            everything = range(self._network.shapes[source][0])
            pieces = [levels, levels]
            for run in extra:
                pieces.append(levels if run == everything else self._channels(levels, f"{stem}.{run.start}", run))
            copies = g.node("Concat", pieces, stem + LEVELS, axis=1)
        else:
            shape = self._network.shapes[source]
            rank = len(shape) + 1
            column = g.node(
                "Unsqueeze", [levels, g.constant(f"constant/axis{rank}", np.array([rank], np.int64))], f"{stem}.column"
            )
            joined = g.node("Concat", [column] * 3, f"{stem}.joined", axis=rank)
            target = g.constant(f"{stem}.shape", np.array([-1, *shape[:-1], 3 * shape[-1]], np.int64))
            copies = g.node("Reshape", [joined, target], stem + LEVELS)
        return g.node("DequantizeLinear", [copies, *self._grid(source, grid)], stem), copies


_INT32, _INT8 = 6, 3  # TensorProto.INT32 and INT8


def _check_symmetric(network: IntegerModel) -> None:
    """Refuse what the symmetric form does not hold."""
    for name, grid in network.grids.items():
        if grid.low - grid.zero_point < -OFFSET or grid.high - grid.zero_point > LARGEST:
            raise InputError(
                f"{name} has levels at {network.bits} bits that int8 without a zero point does not hold; calibrate "
                "with --symmetric, and export widths whose activations have at most 7 bits"
            )
    for layer in network.operations:
        if isinstance(layer, Convolution) and np.abs(layer.bias.astype(np.int64)).max() > MOST_IN_FLOAT:
            raise ConversionError(
                f"a bias of {layer.name} at {network.bits} bits is too many units for float32; use another kernel"
            )


def _check_mean(mean: Average, network: IntegerModel) -> None:
    """Refuse a mean that onnxruntime would not run."""
    source, target = (np.float32(network.grids[name].scale) for name in (mean.inputs[0], mean.output))
    ratio = source / (target * np.float32(np.prod(network.shapes[mean.inputs[0]][1:])))
    least, most = _MEAN_RATIOS
    if not least <= ratio < most:
        raise ConversionError(
            f"the grid of {mean.output} at {network.bits} bits is {'finer' if ratio > 1 else 'coarser'} beside that of "
            f"{mean.inputs[0]} than onnxruntime takes the mean to (a ratio of {ratio:.3g}); calibrate on other samples"
        )


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    return [before for before, _ in padding] + [after for _, after in padding]
