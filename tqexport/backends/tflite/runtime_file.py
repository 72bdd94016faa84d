"""The run-time file in TFLite: a signature per width, and one copy of the codes.

TFLite has no gather over whole networks, but a file may hold several subgraphs, and any number of tensors may read one
buffer. So ``w1`` to ``w8`` are subgraphs of their own, with their own scales, BatchNorm values and activation levels,
and each shifts the same uint8 codes::

    codes -> RIGHT_SHIFT -> CAST -> MUL (scale per channel) -> ADD (offset per channel) -> CONV_2D, ...

Float layers have their weights once, too (``float_layers.py``). All of it runs at every inference, for whoever wants
one file and no other tool. A fixed file of any width, with the form that is quick on a device, can be had from it byte
for byte (``cutting.py``).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.base import EXACT
from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.tflite.convert import FloatNetwork, float_networks, run_once
from tqexport.backends.tflite.encode import put_codes_back
from tqexport.backends.tflite.file import (
    AFFINE,
    DESCRIPTION,
    OPERATOR_CODES,
    WEIGHTS,
    describe,
    finish_fixed,
    make_signature,
    signature_of,
)
from tqexport.backends.tflite.fingerprints import parameters
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.flatbuffer_writing import serialise
from tqexport.backends.tflite.float_layers import store_filters_once
from tqexport.backends.tflite.provenance import FilterOrigin
from tqexport.facts import ArtifactFacts, MultiWidthFacts, check_mergeable
from tqexport.layer_kinds import FILTER_OPERATORS

__all__ = ["convert_to_runtime_tflite"]


@dataclass(frozen=True)
class _Width:
    """What is left to know of a width whose subgraph is in the run-time file.

    Attributes:
        weights: Its quantised weights by name.
        facts: What its fixed file says of itself.
        operator_codes: Where those that its fixed file lists are in the run-time file.
        fixed: Its fixed file.
    """

    weights: Mapping[str, CodedWeight]
    facts: ArtifactFacts
    operator_codes: Sequence[int]
    fixed: bytes


def convert_to_runtime_tflite(
    models: Sequence[onnx.ModelProto], kernel: str = EXACT, batch: int = 1
) -> tuple[bytes, dict[int, bytes]]:
    """Convert the fixed ONNX files of one network to its run-time TFLite file.

    It takes channels last (NHWC). Widths need not share an activation kind here.

    Args:
        models: The fixed files, at least two widths.
        kernel: That of the fixed files, those that come with it and those that can be cut from it; the run-time file
            itself computes with float weights. See :func:`tqexport.backends.tflite.encode.put_codes_back`.
        batch: How many samples all of them take at once.

    Returns:
        The run-time file, loaded and tried; and by width, ascending, the fixed TFLite files, which come with it.

    Raises:
        UsageError: Fewer than two widths.
        InputError: The codes may not be shifted.
        ConversionError: As :func:`tqexport.backends.tflite.convert.convert_to_tflite`.
    """
    networks = list(float_networks(models, batch))
    check_mergeable(network.facts for network in networks)
    values = {network.facts.width: parameters(model) for network, model in zip(networks, models, strict=True)}
    merged = _empty()
    # The widest first: it is what runs where nobody names a signature.
    added = {
        network.facts.width: _add_width(merged, network, values[network.facts.width], kernel)
        for network in sorted(networks, key=lambda network: -network.facts.width)
    }
    widths = dict(sorted(added.items()))
    _describe(merged, widths)
    content, fixed = serialise(merged), {bits: width.fixed for bits, width in widths.items()}
    for bits, fixed_content in fixed.items():
        run_once(content, bits)
        run_once(fixed_content)
    return content, fixed


def _empty() -> Any:
    """An empty file, to which the network of each width is added."""
    return schema.ModelT(
        3, description=DESCRIPTION, buffers=[schema.BufferT()], subgraphs=[], operatorCodes=[], signatureDefs=[]
    )


def _add_width(
    merged: Any, network: FloatNetwork, values: Mapping[str, npt.NDArray[np.float32]], kernel: str
) -> _Width:
    """Make the fixed file of one width, and put its network, with the shift in it, into the run-time file."""
    flat, facts = network.flat, replace(network.facts, kernel=kernel)
    fixed = copy.deepcopy(flat)
    put_codes_back(fixed, network.weights, network.origins, kernel)
    listed = len(flat.model.operatorCodes)
    by_name = {weight.name: weight for weight in network.weights}
    store_filters_once(flat, [origin for origin in network.origins if origin.weight in values], values)
    for origin in network.origins:
        if origin.weight in by_name:
            _shift_at_run_time(flat, origin, by_name[origin.weight])
    where = _append(merged, flat, signature_of(facts.width))
    return _Width(by_name, facts, where[:listed], finish_fixed(fixed, facts))


def _describe(merged: Any, widths: Mapping[int, _Width]) -> None:
    """Write into the metadata what cutting a width needs."""
    names = list(next(iter(widths.values())).weights)
    affine = [[(w.scale, w.offset) for w in (width.weights[name] for width in widths.values())] for name in names]
    tables = {
        WEIGHTS: names,
        AFFINE: np.array(affine, np.float32),
        OPERATOR_CODES: [list(width.operator_codes) for width in widths.values()],
    }
    by_width = {bits: width.facts for bits, width in widths.items()}
    digests = {bits: hashlib.sha256(width.fixed).hexdigest() for bits, width in widths.items()}
    describe(merged, MultiWidthFacts(by_width, digests, tables=tables))


def _shift_at_run_time(flat: FlatModel, origin: FilterOrigin, weight: CodedWeight) -> None:
    """Compute a filter from codes, shift, scale and offset, where the converter wrote it as float32."""
    layout = FILTER_OPERATORS[origin.operator]
    shape = flat.shape(origin.filter)
    codes = layout.from_torch(weight.codes, shape)
    gain = origin.total_gain(shape[layout.channel_axis])

    def per_channel(value: float) -> npt.NDArray[np.float32]:
        return layout.per_channel((gain * value).astype(np.float32))

    stored = flat.add_constant(f"{weight.name}.codes", np.ascontiguousarray(codes))
    shift = flat.add_constant(f"{weight.name}.shift", np.array([weight.shift], np.uint8))
    shifted = flat.add_tensor(f"{weight.name}.shifted", shape, np.uint8)
    number = flat.add_tensor(f"{weight.name}.number", shape)
    scale = flat.add_constant(f"{weight.name}.scale", per_channel(weight.scale))
    scaled = flat.add_tensor(f"{weight.name}.scaled", shape)
    offset = flat.add_constant(f"{weight.name}.offset", per_channel(weight.offset))
    flat.tensor(origin.filter).name, flat.tensor(origin.filter).buffer = weight.name, 0
    cast = schema.CastOptionsT(schema.TensorType.UINT8, schema.TensorType.FLOAT32)
    flat.graph.operators[:0] = [
        flat.operator("RIGHT_SHIFT", [stored, shift], shifted),
        flat.operator("CAST", [shifted], number, cast),
        flat.operator("MUL", [number, scale], scaled, schema.MulOptionsT()),
        flat.operator("ADD", [scaled, offset], origin.filter, schema.AddOptionsT()),
    ]


def _append(merged: Any, flat: FlatModel, signature: str) -> list[int]:
    """Add a file as one more subgraph with a signature; returns where its operator codes went."""
    known = {_operator_key(code): index for index, code in enumerate(merged.operatorCodes)}
    where = []
    for code in flat.model.operatorCodes:
        if _operator_key(code) not in known:
            known[_operator_key(code)] = len(merged.operatorCodes)
            merged.operatorCodes.append(code)
        where.append(known[_operator_key(code)])
    for operator in flat.graph.operators:
        operator.opcodeIndex = where[operator.opcodeIndex]
    moved: dict[int, int] = {}
    for tensor in flat.graph.tensors:
        if tensor.buffer not in moved:
            moved[tensor.buffer] = len(merged.buffers)
            merged.buffers.append(flat.model.buffers[tensor.buffer])
        tensor.buffer = moved[tensor.buffer]
    merged.signatureDefs.append(make_signature(flat.graph, signature, len(merged.subgraphs)))
    merged.subgraphs.append(flat.graph)
    return where


def _operator_key(code: Any) -> tuple[int, int, int, bytes]:
    """Equal for two entries of the operator table that mean the same."""
    return code.builtinCode, code.deprecatedBuiltinCode, code.version, code.customCode or b""
