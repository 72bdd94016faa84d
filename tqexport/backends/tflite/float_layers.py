"""Filters of float layers in a run-time TFLite file: stored once, whatever each width makes of them.

A float layer has the same weights at every width, but the converter folds the width's BatchNorm and activation steps
into its filter: ``filter = weight * gain / steps``, gain per output channel. A run-time file has the weights once, and
a MUL and a DIV per width where there is something to multiply or divide by. They round as the converter's numbers were
rounded, so the filter comes out bit for bit.

Needs numpy and flatbuffers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.tflite.codes import _CHANNEL_AXIS, TO_TORCH, _gain, filters
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator

__all__ = ["WEIGHT_SUFFIX", "FloatFilter", "filters_stored_once", "store_filters_once"]

WEIGHT_SUFFIX = ".float"  # of the names of the weights that are stored once

Array = npt.NDArray[np.float32]
_CALCULATIONS = {"MUL": np.multiply, "DIV": np.divide}


@dataclass(frozen=True)
class FloatFilter:
    """A filter that a run-time file computes from the weights of a float layer.

    Attributes:
        weight: Tensor of the weights.
        filter: Tensor of the filter.
        operators: What leads from one to the other, MUL or DIV or both.
    """

    weight: int
    filter: int
    operators: Sequence[Operator]

    def compute(self, flat: FlatModel, value: Array) -> Array:
        """The filter, from the value of the weights (same shape)."""
        for operator in self.operators:
            factor = _factor(flat, operator)
            value = _CALCULATIONS[flat.operator_name(operator)](value, factor, dtype=np.float32)
        return value

    def invert(self, flat: FlatModel, filter_: Array) -> Array:
        """The value of the weights from the filter, up to rounding; where a channel was multiplied by 0, infinity."""
        value = filter_.astype(np.float64)
        with np.errstate(all="ignore"):
            for operator in reversed(self.operators):
                factor = _factor(flat, operator)
                value = value / factor if flat.operator_name(operator) == "MUL" else value * factor
            return value.astype(np.float32)


def store_filters_once(flat: FlatModel, parameters: Mapping[str, Array]) -> None:
    """Compute the filters of float layers from weights that other widths have too, in front of all other operators.

    A filter that is equal to its weights stays as it is, and so does one that is not recognised.

    Args:
        flat: The converter's file of one width; changed in place.
        parameters: The float32 parameters of the network at this width, in PyTorch's layout.
    """
    steps = sorted({float(value) for name, value in parameters.items() if name.endswith(".levels")})
    weights = {name: value for name, value in parameters.items() if value.ndim > 1}
    for index, kind in filters(flat).items():
        value = flat.constant(index)
        if value is None or value.dtype != np.float32:
            continue
        filter_ = value.transpose(TO_TORCH[kind])
        for name, weight in weights.items():
            if found := _factors(filter_, weight, steps):
                _add(flat, index, kind, name, weight, *found)
                break


def filters_stored_once(flat: FlatModel, operators: Iterable[Operator]) -> list[FloatFilter]:
    """The filters computed by the first of ``operators``, up to the first operator that belongs to none."""
    kinds = filters(flat)
    found: list[FloatFilter] = []
    chain: list[Operator] = []
    for operator in operators:
        source = int(operator.inputs[0])
        if source != int(chain[-1].outputs[0]) if chain else not flat.name(source).endswith(WEIGHT_SUFFIX):
            break
        chain.append(operator)
        if int(operator.outputs[0]) in kinds:
            found.append(FloatFilter(int(chain[0].inputs[0]), int(operator.outputs[0]), chain))
            chain = []
    return found


def _factor(flat: FlatModel, operator: Operator) -> Array:
    factor = flat.constant(int(operator.inputs[1]))
    if factor is None:
        raise ValueError("a float layer has no factor")
    return factor


def _factors(filter_: Array, weight: Array, steps: Sequence[float]) -> tuple[Array, float] | None:
    """``gain`` (one per output channel) and ``steps`` with ``filter_ == weight * gain / steps`` bit for bit."""
    ratio = _gain(filter_, weight.astype(np.float64))
    if ratio is None:
        return None
    rows, reference = np.ascontiguousarray(filter_).reshape(len(filter_), -1), weight.reshape(len(weight), -1)
    for divisor in (1.0, *steps):
        nearest = (ratio * divisor).astype(np.float32)
        gain = np.full_like(nearest, np.nan)
        for towards in (nearest, np.float32(np.inf), np.float32(-np.inf)):  # the ratio is rounded, too
            candidate = np.nextafter(nearest, towards)
            computed = reference * candidate[:, None] / np.float32(divisor)
            fits = (computed.view(np.int32) == rows.view(np.int32)).all(1)  # 0 and -0 are two numbers here
            gain = np.where(np.isnan(gain) & fits, candidate, gain)
        if not np.isnan(gain).any():
            return gain, divisor
    return None


def _add(flat: FlatModel, index: int, kind: str, name: str, weight: Array, gain: Array, steps: float) -> None:
    shape = [int(n) for n in flat.tensor(index).shape]
    order = TO_TORCH[kind]
    channels = np.ones(len(shape), np.int64)
    channels[_CHANNEL_AXIS[kind]] = -1
    factors: list[tuple[str, Array, Any]] = []
    if (gain != 1).any():
        factors.append(("MUL", gain.reshape(channels), schema.MulOptionsT()))
    if steps != 1:
        factors.append(("DIV", np.array([steps], np.float32), schema.DivOptionsT()))
    if not factors:
        return
    stored = weight.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    current = flat.add_constant(name + WEIGHT_SUFFIX, np.ascontiguousarray(stored))
    chain = []
    for kind_, factor, options in factors:
        by = flat.add_constant(f"{name}.{kind_.lower()}", factor)
        result = index if factor is factors[-1][1] else flat.add_tensor(f"{name}.scaled", shape)
        chain.append(flat.operator(kind_, [current, by], result, options))
        current = result
    flat.tensor(index).buffer = 0
    flat.graph.operators[:0] = chain
