"""The integers that a TFLite file stores in the place of codes, and reading them back.

A weight ``alpha * u_b + beta`` is written ``scale * (q + k)`` with q in int8. Below 8 bits q is the odd integer
``2 u_b - M_b`` and k = 0. At 8 bits odd integers do not fit: q = u - 128 and k = 1/2. Bias correction has a k of its
own. An output channel whose gain is negative keeps a positive scale and has its integers turned round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.coded_weight import CodedWeight, joined
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.packing import unpacked_filters
from tqexport.layer_kinds import FILTER_OPERATORS, FilterOperator
from tqexport.truncation import STORED_BITS, integer_codes, max_code

__all__ = ["CONSTANT_SUFFIX", "IntegerFilter", "integer_filter", "integers_of", "stored_integers"]

CONSTANT_SUFFIX = "/constant"  # of the name of the second filter that a constant k may need
_HARMLESS = 1e-30  # the scale of a channel whose gain is 0: its codes stay, and what they make vanishes
_ROUNDING = 2e-6  # relative; of scale and offset to float32


@dataclass(frozen=True)
class IntegerFilter:
    """A filter as integers: ``scale * (integers + constant)`` per output channel.

    Attributes:
        integers: int8 (output channels, input channels, *window).
        scales: float32, one per output channel.
        constants: k, float64, one per output channel.
    """

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    constants: npt.NDArray[np.float64]


def integer_filter(weight: CodedWeight, layout: FilterOperator, shape: list[int], gain: Any) -> IntegerFilter:
    """The integers of a weight as an operator's filter.

    Args:
        weight: The weight.
        layout: The operator's.
        shape: Of the filter in the file.
        gain: float64, one per output channel.
    """
    scale, constant = _scale_and_constant(weight)
    integers = layout.from_torch(integer_codes(weight.shifted(), weight.bits), shape).transpose(layout.axes)
    negative = gain < 0
    turned = negative.reshape(-1, *[1] * (integers.ndim - 1))
    if weight.bits == STORED_BITS:  # ~q is -q - 1, which stays in int8
        integers = np.where(turned, ~integers, integers)
        constants = np.where(negative, 1 - constant, constant)
    else:
        integers = np.where(turned, -integers, integers)
        constants = np.where(negative, -constant, constant)
    scales = np.where(gain == 0, _HARMLESS, np.abs(gain) * scale).astype(np.float32)
    return IntegerFilter(integers, scales, constants)


def _scale_and_constant(weight: CodedWeight) -> tuple[float, float]:
    """scale and k with ``weight = scale * (q + k)``."""
    if weight.bits == STORED_BITS:
        scale, middle, exact = weight.scale, 128.0, 0.5
    else:
        scale, middle, exact = weight.scale / 2, max_code(weight.bits) / 2, 0.0
    constant = (weight.offset + weight.scale * middle) / scale
    # Without bias correction k is exact; what differs is the rounding of scale and offset to float32.
    return scale, exact if abs(constant - exact) * scale <= _ROUNDING * abs(weight.offset) else constant


def integers_of(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """q of a stored filter, same shape: int8 as it is, or float32 from the odd integers of a float16 one."""
    return (stored.astype(np.float32) - 1) / 2 if stored.dtype == np.float16 else stored


def stored_integers(flat: FlatModel) -> dict[str, list[npt.NDArray[Any]]]:
    """The integers q of a fixed file's filters by weight name, in PyTorch's axis order.

    They are int8, or float32 where the file has float16. A filter may hold further input channels behind those of the
    layer. The second filter that a k may need is not among them: it holds no codes. Packed ones are unpacked.

    Raises:
        InputError: A packed filter is damaged.
    """
    integers: dict[str, list[npt.NDArray[Any]]] = {}
    seen: set[int] = set()
    unpacked = unpacked_filters(flat)
    dequantized = {
        int(operator.outputs[0]): int(operator.inputs[0])
        for operator in flat.graph.operators
        if flat.operator_name(operator) == "DEQUANTIZE"
    }
    for operator in flat.graph.operators:
        layout = FILTER_OPERATORS.get(flat.operator_name(operator))
        if layout is None:
            continue
        filter_ = int(operator.inputs[layout.filter])
        codes = dequantized.get(filter_, filter_)
        value = unpacked[codes] if codes in unpacked else flat.constant(codes)
        name = flat.name(codes).removesuffix(".codes")
        if value is None or value.dtype not in (np.int8, np.float16) or value.ndim != len(layout.torch_axes):
            continue
        if codes in seen or name.endswith(CONSTANT_SUFFIX):
            continue
        seen.add(codes)
        integers.setdefault(name, []).append(integers_of(value).transpose(layout.torch_axes))
    return joined(integers)
