"""Writing integers into a TFLite file as an operator's filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.tflite.flatbuffer import FlatModel, type_code
from tqexport.layer_kinds import FilterOperator

__all__ = ["store", "store_dequantized"]

_EQUAL_SCALES = 1e-7  # relative; each scale of its own costs 12 bytes in the file


def store_dequantized(
    flat: FlatModel,
    target: int,
    layout: FilterOperator,
    name: str,
    stored: npt.NDArray[Any],
    scales: npt.NDArray[np.float32] | None,
) -> None:
    """Make tensor ``target`` a float32 one that is de-quantised from ``stored``; see :func:`store`."""
    codes = flat.add_tensor(name, ())
    store(flat, codes, layout, name, stored, scales)
    tensor = flat.tensor(target)
    tensor.name, tensor.shape, tensor.buffer = name, flat.tensor(codes).shape, 0
    operator = flat.operator("DEQUANTIZE", [codes], target, schema.DequantizeOptionsT(), version=5)
    flat.graph.operators.insert(0, operator)


def store(
    flat: FlatModel,
    target: int,
    layout: FilterOperator,
    name: str,
    stored: npt.NDArray[Any],
    scales: npt.NDArray[np.float32] | None,
) -> None:
    """Make tensor ``target`` the constant ``NAME.codes``.

    Args:
        flat: The file; changed in place.
        target: The tensor's index.
        layout: Of the operator that reads it.
        name: Name of the weight.
        stored: int8 or float16 (output channels, input channels, *window).
        scales: Of int8, per output channel.
    """
    value = np.ascontiguousarray(stored.transpose(np.argsort(layout.axes)))
    tensor = flat.tensor(target)
    tensor.name, tensor.shape, tensor.type = f"{name}.codes", np.array(value.shape, np.int32), type_code(value.dtype)
    flat.set_constant(target, value)
    if scales is None:
        return
    if np.ptp(scales) <= _EQUAL_SCALES * scales.max():
        scales = scales[:1]
    tensor.quantization = schema.QuantizationParametersT(
        scale=scales, zeroPoint=np.zeros(len(scales), np.int64), quantizedDimension=layout.channel_axis
    )
