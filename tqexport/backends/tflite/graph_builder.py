"""Putting TFLite graphs of int8 values together, operator by operator, with nothing of a network in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.tflite.file import finish_fixed
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.packing import DECODE, STREAM_SUFFIX, TABLE_SUFFIX, PackedFilter
from tqexport.facts import ArtifactFacts
from tqexport.integer.grids import HIGHEST, OFFSET, Grid

__all__ = ["TFLiteGraph", "activation_of", "same_padding"]


class TFLiteGraph:
    """Tensors and operators in the order they are added; tensors are named by their index."""

    def __init__(self) -> None:
        model = schema.ModelT()
        model.version, model.description = 3, "tqexport"
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "network", [], []
        graph.inputs = graph.outputs = np.array([], np.int32)
        model.subgraphs, model.buffers, model.operatorCodes = [graph], [schema.BufferT()], []
        self.flat = FlatModel.of(model)
        self._whole: dict[bytes, int] = {}

    def value(self, name: str, shape: Sequence[int], grid: Grid | None) -> int:
        """Add a computed tensor: int8 on a grid, or float32 without."""
        index = self.flat.add_tensor(name, shape, np.float32 if grid is None else np.int8)
        if grid is not None:
            self._quantize(index, [grid.scale], [grid.zero_point - OFFSET], 0)
        return index

    def weight(
        self, name: str, value: npt.NDArray[np.int8 | np.int32], scale: npt.NDArray[np.float32], axis: int
    ) -> int:
        """Add constant integers with a scale for each index of an axis."""
        index = self.flat.add_constant(name, value)
        self._quantize(index, scale, np.zeros(len(scale), np.int64), axis)
        return index

    def packed_weight(
        self, name: str, shape: Sequence[int], packed: PackedFilter, scale: npt.NDArray[np.float32], axis: int
    ) -> int:
        """Add int8 weights that are unpacked as the file runs, for the operator that is added next."""
        stream = self.flat.add_constant(name + STREAM_SUFFIX, packed.stream)
        table = self.flat.add_constant(name + TABLE_SUFFIX, packed.table)
        index = self.flat.add_tensor(name, shape, np.int8)
        self._quantize(index, scale, np.zeros(len(scale), np.int64), axis)
        self.flat.graph.operators.append(self.flat.custom_operator(DECODE, [stream, table], index))
        return index

    def integers(self, *values: int) -> int:
        """Add whole numbers that an operator takes as a tensor, such as axes; int32."""
        return self.matrix(np.array(values, np.int32))

    def matrix(self, value: npt.NDArray[np.int32]) -> int:
        """Add a constant int32 tensor that an operator takes; equal ones once."""
        key = bytes(str(value.shape), "ascii") + value.tobytes()
        if key not in self._whole:
            self._whole[key] = self.flat.add_constant(f"constant/{len(self._whole)}", value)
        return self._whole[key]

    def operator(self, kind: str, inputs: Sequence[int], output: int, options: Any = None, *, version: int = 2) -> int:
        """Add an operator; returns its output."""
        self.flat.graph.operators.append(self.flat.operator(kind, inputs, output, options, version=version))
        return output

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(int(size) for size in self.flat.tensor(index).shape)

    def pack(self, source: int, result: int, facts: ArtifactFacts) -> bytes:
        """The file, with one input and one output."""
        self.flat.graph.inputs, self.flat.graph.outputs = np.array([source], np.int32), np.array([result], np.int32)
        return finish_fixed(self.flat, facts)

    def _quantize(self, index: int, scale: Any, zero_point: Any, axis: int) -> None:
        quantization = schema.QuantizationParametersT()
        quantization.scale = np.asarray(scale, np.float32)
        quantization.zeroPoint = np.asarray(zero_point, np.int64)
        quantization.quantizedDimension = axis
        self.flat.tensor(index).quantization = quantization


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """What TFLite's SAME adds before and after an axis of ``size``."""
    reach = dilation * (kernel - 1) + 1
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def activation_of(grid: Grid) -> int:
    """The fused activation that clamps to a grid whose range is not that of its 256 levels.

    ``RELU_N1_TO_1`` clamps to [-1, 1], which on a grid of scale ``1 / M_a`` and the least zero point is 0 to ``M_a``.
    """
    if grid.low == 0 and grid.high == HIGHEST:
        return int(schema.ActivationFunctionType.NONE)
    if grid.low == 0 and grid.zero_point == 0 and round(1 / grid.scale) == grid.high:
        return int(schema.ActivationFunctionType.RELU_N1_TO_1)
    if grid.low == grid.zero_point and grid.high == HIGHEST:
        return int(schema.ActivationFunctionType.RELU)
    raise ValueError(f"no activation of TFLite clamps to {grid}")
