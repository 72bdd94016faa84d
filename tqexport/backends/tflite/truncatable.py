"""Fixed TFLite files that other widths can be cut from: a fixed file, and in its metadata what those need besides.

A fixed TFLite file stores the upper bits of its codes alone, so it can give its own width and the narrower ones. What
they need is in their run-time file (:mod:`tqexport.backends.tflite.runtime_file`), most of which the fixed file has,
too: the codes and the constants that are the same. So the metadata holds the run-time file without these. The weights
of a float layer that has the BatchNorm of its width in its filter come back from the filter up to rounding; the
differences are stored.

Needs numpy and flatbuffers alone.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.onnx.runtime_file import AFFINE, BY_WIDTH, DIGESTS, OPERATOR_CODES, TRUNCATABLE_TO, WIDTHS
from tqexport.backends.tflite.codes import TO_TORCH, integers_of
from tqexport.backends.tflite.file import (
    TABLES_NAME,
    describe,
    finish_fixed,
    graph_of,
    make_signature,
    signature_of,
    subgraph_of,
    unpack,
)
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.flatbuffer_writing import serialise, write
from tqexport.backends.tflite.float_layers import FloatFilter, filters_stored_once
from tqexport.backends.tflite.truncate import ComputedWeight, computed_weights
from tqexport.errors import ConversionError
from tqexport.truncation import STORED_BITS, max_code

__all__ = ["run_time_model", "truncatable_tflite"]


def truncatable_tflite(run_time: bytes, fixed: Mapping[int, bytes], widths: Sequence[int]) -> dict[int, bytes]:
    """Give fixed TFLite files the tables of all narrower widths.

    Args:
        run_time: The run-time file of the network.
        fixed: The fixed files of its widths.
        widths: The widths to give tables to; each is one of ``fixed``.

    Returns:
        Each of ``widths`` with its file; the file of the narrowest width is the plain one.

    Raises:
        ConversionError: What a file lacks cannot be had from it; report the network.
    """
    model, facts = unpack(run_time)
    return {bits: _truncatable(model, facts, fixed[bits], bits) for bits in widths}


def run_time_model(content: bytes) -> tuple[Any, dict[str, Any]]:
    """The run-time file of the widths in a fixed file with tables, and what it says of itself.

    Args:
        content: The fixed file.

    Returns:
        As :func:`tqexport.backends.tflite.file.unpack` does.

    Raises:
        InputError: The tables are damaged.
    """
    flat = FlatModel(content)
    model, facts = unpack(flat.metadata(TABLES_NAME) or b"")
    bits = int(unpack(content)[1]["width"])
    graph = graph_of(model, bits)

    def put(tensor: int, value: npt.NDArray[Any] | bytes) -> None:
        data = value if isinstance(value, bytes) else value.tobytes()
        model.buffers[graph.tensors[tensor].buffer].data = np.frombuffer(data, np.uint8)

    for tensor in range(len(graph.tensors)):
        buffer = graph.tensors[tensor].buffer
        if buffer and not _content(model.buffers[buffer]) and tensor < len(flat.graph.tensors):
            put(tensor, _content(flat.model.buffers[flat.tensor(tensor).buffer]))
    own = subgraph_of(model, bits)
    weights = computed_weights(own)
    for weight in weights:
        put(weight.codes, _codes(flat, own, weight, bits))
    for each in filters_stored_once(own, own.graph.operators[4 * len(weights) :]):
        shape = [int(n) for n in own.tensor(each.weight).shape]
        stored = bytes(model.buffers[graph.tensors[each.weight].buffer].data)
        if len(stored) < 4 * int(np.prod(shape)):
            difference = np.frombuffer(zlib.decompress(stored), np.int8).reshape(shape)
            put(each.weight, _nearly(flat, own, each) + difference)
    return model, facts


def _truncatable(model: Any, facts: Mapping[str, Any], fixed: bytes, bits: int) -> bytes:
    widths = [width for width in facts[WIDTHS] if width <= bits]
    if len(widths) == 1:
        return fixed
    run_time = _restricted(model, facts, widths, bits)
    flat = FlatModel(fixed)
    tables = _without_what_is_there(run_time, flat, bits)
    content = finish_fixed(flat, {**unpack(fixed)[1], TRUNCATABLE_TO: widths}, tables)
    given_back, needed = run_time_model(content)[0].buffers, unpack(run_time)[0].buffers
    if list(map(_content, given_back)) != list(map(_content, needed)):
        raise ConversionError(f"the file of {bits} bits does not give back what its other widths need")
    return content


def _restricted(model: Any, facts: Mapping[str, Any], widths: Sequence[int], stored_bits: int) -> bytes:
    """The run-time file of some of the widths, with the upper bits of the codes alone."""
    rows = [facts[WIDTHS].index(bits) for bits in widths]
    part = copy.copy(model)
    part.buffers, part.subgraphs, part.signatureDefs = list(model.buffers), [], []
    for bits in sorted(widths, reverse=True):
        graph = copy.copy(graph_of(model, bits))
        graph.tensors = [copy.copy(tensor) for tensor in graph.tensors]
        part.signatureDefs.append(make_signature(graph, signature_of(bits), len(part.subgraphs)))
        part.subgraphs.append(graph)
    own = graph_of(model, stored_bits)
    for buffer in {own.tensors[weight.codes].buffer for weight in computed_weights(subgraph_of(model, stored_bits))}:
        upper = np.asarray(model.buffers[buffer].data, np.uint8) & np.uint8(0xFF << (STORED_BITS - stored_bits) & 0xFF)
        part.buffers[buffer] = schema.BufferT(upper)
    chosen = {key: [facts[key][row] for row in rows] for key in (WIDTHS, DIGESTS, OPERATOR_CODES)}
    by_width = {key: [values[row] for row in rows] for key, values in facts[BY_WIDTH].items()}
    describe(part, {**facts, **chosen, BY_WIDTH: by_width, AFFINE: facts[AFFINE][:, rows]})
    return serialise(part)


def _without_what_is_there(run_time: bytes, flat: FlatModel, bits: int) -> bytes:
    """A run-time file without the data that the fixed file of one of its widths has, too."""
    model, _ = unpack(run_time)
    own, graph = subgraph_of(model, bits), graph_of(model, bits)
    weights = computed_weights(own)
    stored_once = filters_stored_once(own, own.graph.operators[4 * len(weights) :])
    by_buffer = {graph.tensors[each.weight].buffer: each for each in reversed(stored_once)}  # the first of a layer's
    for index, each in by_buffer.items():
        value = own.constant(each.weight)
        assert value is not None
        difference = value.view(np.int32).astype(np.int64) - _nearly(flat, own, each)
        buffer = model.buffers[index]
        if np.abs(difference).max() < 128:
            compressed = zlib.compress(difference.astype(np.int8).tobytes(), 9)
            buffer.data = np.frombuffer(min(compressed, value.tobytes(), key=len), np.uint8)
    for weight in weights:
        model.buffers[graph.tensors[weight.codes].buffer].data = None
    for tensor, there in zip(graph.tensors, flat.graph.tensors, strict=False):
        if tensor.buffer and np.array_equal(model.buffers[tensor.buffer].data, flat.model.buffers[there.buffer].data):
            model.buffers[tensor.buffer].data = None
    return write(model)


def _codes(flat: FlatModel, own: FlatModel, weight: ComputedWeight, bits: int) -> npt.NDArray[np.uint8]:
    """The upper bits of the codes, from the filter of a fixed file, in the axis order of the run-time file."""
    sources = {
        int(operator.outputs[0]): int(operator.inputs[0])
        for operator in flat.graph.operators
        if flat.operator_name(operator) == "DEQUANTIZE"
    }
    stored = flat.constant(sources.get(weight.filter, weight.filter))
    scale = own.constant(weight.scale)
    if stored is None or scale is None:
        raise ValueError("a weight has no codes or no scale")
    order = TO_TORCH[weight.kind]
    shape = [int(own.tensor(weight.codes).shape[axis]) for axis in order]
    integers = integers_of(stored).transpose(order)[:, : shape[1]].astype(np.int16)
    negative = (scale.ravel() < 0).reshape(-1, *[1] * (len(shape) - 1))
    if bits == STORED_BITS:
        codes = np.where(negative, ~integers, integers) + 128
    else:
        codes = (np.where(negative, -integers, integers) + max_code(bits)) // 2
    aligned = (codes << (STORED_BITS - bits)).astype(np.uint8)
    return np.ascontiguousarray(aligned.transpose(np.argsort(order)))


def _nearly(flat: FlatModel, own: FlatModel, computed: FloatFilter) -> npt.NDArray[np.int32]:
    """The weights of a float layer from its filter in a fixed file, up to rounding; float32 seen as int32."""
    filter_ = flat.constant(computed.filter)
    if filter_ is None:
        raise ValueError("a float layer has no filter")
    return computed.invert(own, filter_).view(np.int32)


def _content(buffer: Any) -> bytes:
    return b"" if buffer.data is None else bytes(buffer.data)
