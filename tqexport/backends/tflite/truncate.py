"""The fixed TFLite file of one width from the run-time file.

A run-time file has the converter's network with four operators per weight in front (see
:mod:`tqexport.backends.tflite.runtime_file`), and one or two per filter of a float layer. Taking them away again,
computing the float filters, and putting the codes back as for a fixed file, gives the fixed file. Scale and offset of
each weight are in the metadata, because a scale per channel cannot be taken apart into the weight's and the channel's
without rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tqexport.backends.onnx.file import CodedWeight
from tqexport.backends.onnx.runtime_file import AFFINE, OPERATOR_CODES, WEIGHTS, WIDTHS
from tqexport.backends.tflite.codes import TO_TORCH, _Match, _replace, filters
from tqexport.backends.tflite.file import finish_fixed, subgraph_of
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator
from tqexport.backends.tflite.float_layers import FloatFilter, filters_stored_once
from tqexport.truncation import STORED_BITS

__all__ = ["ComputedWeight", "computed_weights", "fixed_tflite"]


@dataclass(frozen=True)
class ComputedWeight:
    """A quantised weight that a run-time file computes.

    Attributes:
        operators: The four operators, first to last.
        kind: The operator that the weight is the filter of.
    """

    operators: Sequence[Operator]
    kind: str

    @property
    def codes(self) -> int:
        """Tensor of the codes; the first that was added to the converter's."""
        return int(self.operators[0].inputs[0])

    @property
    def scale(self) -> int:
        """Tensor of the scale per channel."""
        return int(self.operators[2].inputs[1])

    @property
    def filter(self) -> int:
        """Tensor of the weight."""
        return int(self.operators[3].outputs[0])


def fixed_tflite(model: Any, facts: Mapping[str, Any], fixed_facts: Mapping[str, Any], bits: int) -> bytes:
    """The fixed file of one width.

    Args:
        model: The run-time file, from :func:`tqexport.backends.tflite.file.unpack`.
        facts: What it says of itself, likewise.
        fixed_facts: What the fixed file is to say of itself.
        bits: A width that it has.
    """
    row = facts[WIDTHS].index(bits)
    flat = subgraph_of(model, bits)
    found = computed_weights(flat)
    matches = [_match(flat, each, bits, facts[WEIGHTS], facts[AFFINE][:, row]) for each in found]
    computed = filters_stored_once(flat, flat.graph.operators[4 * len(found) :])
    for each in computed:
        _restore(flat, each)
    flat.graph.operators = flat.graph.operators[4 * len(found) + sum(len(each.operators) for each in computed) :]
    flat.graph.tensors = flat.graph.tensors[: min([each.codes for each in found] + [each.weight for each in computed])]
    _list_operator_codes(flat, facts[OPERATOR_CODES][row])
    for match in matches:
        _replace(flat, match, fixed_facts["kernel"])
    return finish_fixed(flat, fixed_facts)


def computed_weights(flat: FlatModel) -> list[ComputedWeight]:
    """The computed weights of one width, in the order in which they were found in the converter's file."""
    kinds = filters(flat)
    operators = flat.graph.operators
    found: list[ComputedWeight] = []
    while flat.operator_name(operators[4 * len(found)]) == "RIGHT_SHIFT":
        four = operators[4 * len(found) : 4 * len(found) + 4]
        found.append(ComputedWeight(four, kinds[int(four[3].outputs[0])]))
    return found[::-1]  # each was put in front of those before it


def _match(flat: FlatModel, computed: ComputedWeight, bits: int, names: Sequence[str], affine: Any) -> _Match:
    codes, scale = flat.constant(computed.codes), flat.constant(computed.scale)
    if codes is None or scale is None:
        raise ValueError("a weight has no codes or no scale")
    name = flat.name(computed.filter)
    alpha, beta = map(float, affine[names.index(name)])
    weight = CodedWeight(name, codes.transpose(TO_TORCH[computed.kind]), STORED_BITS - bits, alpha, beta, bits)
    return _Match(computed.filter, computed.kind, weight, scale.astype(np.float64).ravel() / alpha)


def _restore(flat: FlatModel, computed: FloatFilter) -> None:
    weight = flat.constant(computed.weight)
    if weight is None:
        raise ValueError("a float layer has no weights")
    flat.set_constant(computed.filter, computed.compute(flat, weight))


def _list_operator_codes(flat: FlatModel, listed: Sequence[int]) -> None:
    """List the operator codes as the converter did for this width alone."""
    flat.model.operatorCodes = [flat.model.operatorCodes[index] for index in listed]
    for operator in flat.graph.operators:
        operator.opcodeIndex = listed.index(operator.opcodeIndex)
