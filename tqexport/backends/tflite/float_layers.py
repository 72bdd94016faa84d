"""Filters of float layers in a run-time TFLite file: stored once, whatever each width makes of them.

A float layer has the same weights at every width, but the converter folds the width's BatchNorm and activation steps
into its filter: ``filter = weight * gain / steps``, gain per output channel. A run-time file has the weights once, and
a MUL or two and a DIV per width where there is something to multiply or divide by. They round as the converter's
numbers were rounded, so the filter comes out bit for bit.

Needs numpy and flatbuffers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.tflite.flatbuffer import FlatModel, Operator
from tqexport.backends.tflite.provenance import FilterOrigin, filters
from tqexport.layer_kinds import FILTER_OPERATORS

__all__ = ["FloatFilter", "filters_stored_once", "store_filters_once"]

WEIGHT_SUFFIX = ".float"  # of the names of the weights that are stored once

Array = npt.NDArray[np.float32]
_CALCULATIONS = {"MUL": np.multiply, "DIV": np.divide}


@dataclass(frozen=True)
class FloatFilter:
    """A filter that a run-time file computes from the weights of a float layer.

    Attributes:
        weight: Tensor of the weights.
        filter: Tensor of the filter.
        operators: What leads from one to the other, MUL or DIV or several of them.
    """

    weight: int
    filter: int
    operators: Sequence[Operator]

    def restore(self, flat: FlatModel) -> None:
        """Make the filter the constant that the converter wrote.

        Raises:
            ValueError: A constant is not there; the file was damaged.
        """
        value = _constant(flat, self.weight)
        for operator in self.operators:
            factor = _constant(flat, int(operator.inputs[1]))
            value = _CALCULATIONS[flat.operator_name(operator)](value, factor, dtype=np.float32)
        flat.set_constant(self.filter, value)


def store_filters_once(flat: FlatModel, origins: Iterable[FilterOrigin], weights: Mapping[str, Array]) -> None:
    """Compute the filters of float layers from weights that other widths have too, in front of all other operators.

    Args:
        flat: The converter's file of one width; changed in place.
        origins: Where the filters of these layers come from. One that is equal to its weights stays as it is.
        weights: The float32 weights by name, in PyTorch's layout.
    """
    for origin in origins:
        layout = FILTER_OPERATORS[origin.operator]
        factors: list[tuple[str, Array, Any]] = []
        for gain in origin.gains:
            if (gain != 1).any():
                factors.append(("MUL", layout.per_channel(gain.astype(np.float32)), schema.MulOptionsT()))
        if origin.steps != 1:
            factors.append(("DIV", np.array([origin.steps], np.float32), schema.DivOptionsT()))
        if factors:
            _compute(flat, origin, weights[origin.weight], factors)


def filters_stored_once(flat: FlatModel, operators: Iterable[Operator]) -> list[FloatFilter]:
    """The filters computed by the first of ``operators``, up to the first operator that belongs to none."""
    kinds = filters(flat)
    computed: list[FloatFilter] = []
    chain: list[Operator] = []
    for operator in operators:
        source = int(operator.inputs[0])
        if source != int(chain[-1].outputs[0]) if chain else not flat.name(source).endswith(WEIGHT_SUFFIX):
            break
        chain.append(operator)
        if int(operator.outputs[0]) in kinds:
            computed.append(FloatFilter(int(chain[0].inputs[0]), int(operator.outputs[0]), chain))
            chain = []
    return computed


def _compute(flat: FlatModel, origin: FilterOrigin, weight: Array, factors: Sequence[tuple[str, Array, Any]]) -> None:
    """Put the operators that compute one filter in front of all others."""
    shape = flat.shape(origin.filter)
    stored = FILTER_OPERATORS[origin.operator].from_torch(weight, shape)
    current = flat.add_constant(origin.weight + WEIGHT_SUFFIX, np.ascontiguousarray(stored))
    chain = []
    for kind, factor, options in factors:
        by = flat.add_constant(f"{origin.weight}.{kind.lower()}", factor)
        last = factor is factors[-1][1]
        result = origin.filter if last else flat.add_tensor(f"{origin.weight}.scaled", shape)
        chain.append(flat.operator(kind, [current, by], result, options))
        current = result
    flat.tensor(origin.filter).buffer = 0
    flat.graph.operators[:0] = chain


def _constant(flat: FlatModel, index: int) -> Array:
    value = flat.constant(index)
    if value is None:
        raise ValueError(f"tensor {index} is no constant")
    return value
