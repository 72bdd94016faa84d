"""The fixed TFLite file of one width from the run-time file.

A run-time file has the converter's network with four operators per weight in front (``runtime_file.py``), and one or
two per filter of a float layer. Taking them away again, computing the float filters, and putting the codes back as for
a fixed file, gives the fixed file. Scale and offset of each weight are in the metadata, because a scale per channel
cannot be taken apart into the weight's and the channel's without rounding.

Needs numpy and flatbuffers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.base import EXACT
from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.tflite.encode import encode_filter
from tqexport.backends.tflite.file import AFFINE, OPERATOR_CODES, WEIGHTS, finish_fixed, subgraph_of, unpack
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.float_layers import filters_stored_once
from tqexport.backends.tflite.provenance import FilterOrigin, filters
from tqexport.errors import ConversionError, InputError
from tqexport.facts import DAMAGED, MultiWidthFacts
from tqexport.layer_kinds import FILTER_OPERATORS
from tqexport.truncation import STORED_BITS

__all__ = ["ComputedWeight", "computed_codes", "computed_weights", "cut_tflite"]

_CHAIN = ("RIGHT_SHIFT", "CAST", "MUL", "ADD")  # what computes a weight in a run-time file


@dataclass(frozen=True)
class ComputedWeight:
    """A quantised weight that a run-time file computes.

    Attributes:
        kind: The operator that the weight is the filter of.
        codes: Tensor of the codes; the first that was added to the converter's.
        shifted: Tensor of the shifted codes.
        scale: Tensor of the scale per channel.
        filter: Tensor of the weight.
    """

    kind: str
    codes: int
    shifted: int
    scale: int
    filter: int


def cut_tflite(content: bytes, bits: int) -> bytes:
    """Cut the fixed file of one width out of a run-time file.

    Args:
        content: A run-time file.
        bits: A width that it has.

    Raises:
        InputError: It is damaged.
    """
    model, facts = unpack(content)
    if not isinstance(facts, MultiWidthFacts):
        raise InputError(DAMAGED)
    try:
        return _cut(model, facts, bits)
    except (LookupError, ValueError, TypeError, AttributeError, ConversionError) as error:  # tables not of our making
        raise InputError(DAMAGED) from error


def computed_weights(flat: FlatModel) -> list[ComputedWeight]:
    """The computed weights of one width, in the order in which they were put in front of the converter's network.

    Raises:
        InputError: What stands there is no such weight.
    """
    kinds = filters(flat)
    operators = flat.graph.operators
    computed: list[ComputedWeight] = []
    position = 0
    while position < len(operators) and flat.operator_name(operators[position]) == _CHAIN[0]:
        chain = operators[position : position + len(_CHAIN)]
        filter_ = int(chain[-1].outputs[0])
        if tuple(map(flat.operator_name, chain)) != _CHAIN or filter_ not in kinds:
            raise InputError(DAMAGED)
        codes, shifted, scale = chain[0].inputs[0], chain[0].outputs[0], chain[2].inputs[1]
        computed.append(ComputedWeight(kinds[filter_], int(codes), int(shifted), int(scale), filter_))
        position += len(_CHAIN)
    return computed[::-1]


def computed_codes(flat: FlatModel) -> dict[str, npt.NDArray[np.uint8]]:
    """The stored codes of each computed weight by name, uint8 in PyTorch's axis order.

    Raises:
        InputError: There are none of a weight.
    """
    codes = {}
    for weight in computed_weights(flat):
        stored, axes = flat.constant(weight.codes), FILTER_OPERATORS[weight.kind].torch_axes
        if stored is None or stored.dtype != np.uint8 or stored.ndim != len(axes):
            raise InputError(DAMAGED)
        codes[flat.name(weight.filter)] = stored.transpose(axes)
    return codes


def _cut(model: Any, facts: MultiWidthFacts, bits: int) -> bytes:
    """Undo, for one width, what made the run-time file, and put the codes back as a fixed file has them."""
    row = facts.widths.index(bits)
    flat = subgraph_of(model, bits)
    computed = computed_weights(flat)
    affine = dict(zip(facts.tables[WEIGHTS], facts.tables[AFFINE][:, row].tolist(), strict=True))
    weights = {
        name: CodedWeight(name, codes, STORED_BITS - bits, affine[name][0], affine[name][1], bits)
        for name, codes in computed_codes(flat).items()
    }
    origins = [_origin(flat, weight, affine) for weight in computed]
    in_front = len(_CHAIN) * len(computed)
    float_filters = filters_stored_once(flat, flat.graph.operators[in_front:])
    for float_filter in float_filters:
        float_filter.restore(flat)
    in_front += sum(len(float_filter.operators) for float_filter in float_filters)
    added = [weight.codes for weight in computed] + [float_filter.weight for float_filter in float_filters]
    flat.graph.operators = flat.graph.operators[in_front:]
    flat.graph.tensors = flat.graph.tensors[: min(added)]
    _list_operator_codes(flat, facts.tables[OPERATOR_CODES][row])
    own = facts.by_width[bits]
    for origin in origins:
        encode_filter(flat, origin, weights[origin.weight], own.kernel or EXACT)
    return finish_fixed(flat, own)


def _origin(flat: FlatModel, computed: ComputedWeight, affine: Mapping[str, Sequence[float]]) -> FilterOrigin:
    """Where the filter comes from that a computed weight was put in the place of."""
    scale = flat.constant(computed.scale)
    if scale is None:
        raise ValueError("a weight has no scale")
    name = flat.name(computed.filter)
    return FilterOrigin(computed.filter, computed.kind, name, (scale.astype(np.float64).ravel() / affine[name][0],))


def _list_operator_codes(flat: FlatModel, listed: Sequence[int]) -> None:
    """List the operator codes as the converter did for this width alone."""
    flat.model.operatorCodes = [flat.model.operatorCodes[index] for index in listed]
    for operator in flat.graph.operators:
        operator.opcodeIndex = listed.index(operator.opcodeIndex)
