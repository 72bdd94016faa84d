"""One TFLite file for every width: a signature per width, and one copy of the codes.

TFLite has no gather over whole networks, but a file may hold several subgraphs, and any number of tensors may read one
buffer. So ``w1`` to ``w8`` are subgraphs of their own, with their own scales, BatchNorm values and activation levels,
and each shifts the same uint8 codes::

    codes -> RIGHT_SHIFT -> CAST -> MUL (scale per channel) -> ADD (offset per channel) -> CONV_2D, ...

That runs at every inference, for whoever wants one file and no other tool. A fixed file of any width, with the form
that is quick on a device, can be had from it byte for byte (:mod:`tqexport.tflite_truncate`).

Needs numpy and flatbuffers alone, except for :func:`convert_to_switchable_tflite`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.errors import ConversionError, InputError
from tqexport.flatbuffer import FlatModel
from tqexport.onnx_file import CodedWeight
from tqexport.switching import (
    AFFINE,
    DIGESTS,
    OPERATOR_CODES,
    WEIGHTS,
    WIDTHS,
    check_switchable,
    facts_by_width,
)
from tqexport.tflite_codes import _CHANNEL_AXIS, TO_TORCH, _Match, _match, put_codes_back

if TYPE_CHECKING:
    import onnx

__all__ = [
    "METADATA_NAME",
    "convert_to_switchable_tflite",
    "finish_fixed",
    "signature_of",
    "subgraph_of",
    "unpack",
]

METADATA_NAME = "tqexport"
_AFFINE_NAME = "tqexport.affine"  # metadata of its own, because as JSON it would be six times the size
_DESCRIPTION = "tqexport"
_FIXED_SIGNATURE = "serving_default"


@dataclass(frozen=True)
class _Width:
    """One width as the converter wrote it, with its codes found again."""

    flat: FlatModel
    weights: Sequence[CodedWeight]
    matches: Sequence[_Match]
    facts: Mapping[str, Any]
    fixed: bytes


def convert_to_switchable_tflite(models: Sequence[onnx.ModelProto]) -> tuple[bytes, dict[int, bytes]]:
    """Convert the fixed ONNX files of one network to its run-time TFLite file.

    Inputs and outputs are channels last (NHWC). Widths need not share an activation kind here.

    Args:
        models: The fixed files, at least two widths.

    Returns:
        The run-time file, loaded and tried; and by width the fixed TFLite files, which come with it.

    Raises:
        UsageError: Fewer than two widths.
        InputError: The codes may not be shifted.
        ConversionError: As :func:`tqexport.tflite_export.convert_to_tflite`.
    """
    from tqexport.float_graph import with_float_weights, without_batch_norms
    from tqexport.onnx_file import coded_weights, read_metadata
    from tqexport.tflite_export import _converted, run_once

    by_width = dict(sorted((int(read_metadata(model)["width"]), model) for model in models))
    check_switchable(tuple(by_width), str(read_metadata(models[0]).get("quantizer")) if models else "truncquant")
    weights = [coded_weights(model) for model in by_width.values()]
    floats = [
        without_batch_norms(with_float_weights(model, found))
        for model, found in zip(by_width.values(), weights, strict=True)
    ]
    widths = {
        bits: _width(flat, model, found)
        for (bits, model), found, flat in zip(by_width.items(), weights, _converted(floats), strict=True)
    }
    for width in widths.values():
        run_once(width.fixed)
    merged = _merge(widths)
    _run_every_signature(merged, tuple(widths))
    return merged, {bits: width.fixed for bits, width in widths.items()}


def finish_fixed(flat: FlatModel, facts: Mapping[str, Any]) -> bytes:
    """Describe a fixed file whose codes are in place, and serialise it."""
    # The converter leaves it out where TensorFlow cannot save the function first.
    flat.model.signatureDefs = [_signature(flat.graph, _FIXED_SIGNATURE, 0)]
    flat.set_metadata({METADATA_NAME: json.dumps(facts, sort_keys=True).encode()})
    flat.model.description = _DESCRIPTION
    return flat.pack()


def unpack(content: bytes) -> tuple[Any, dict[str, Any]]:
    """The schema's model object of a file, and what the file says of itself.

    Raises:
        InputError: It is damaged, or tqexport did not write it.
    """
    try:
        model: Any = schema.ModelT.InitFromPackedBuf(content, 0)
        named = {_text(entry.name): model.buffers[entry.buffer].data for entry in model.metadata or []}
        facts = json.loads(bytes(named[METADATA_NAME]))
        if WIDTHS in facts:
            shape = len(facts[WEIGHTS]), len(facts[WIDTHS]), 2
            facts[AFFINE] = np.frombuffer(bytes(named[_AFFINE_NAME]), np.float32).reshape(shape)
    except Exception as error:  # the flatbuffer reader meets damage as whatever it happens to do first
        raise InputError("is not a valid TFLite file of tqexport; export it again") from error
    return model, facts


def signature_of(bits: int) -> str:
    """Name of the signature of a width."""
    return f"w{bits}"


def subgraph_of(model: Any, bits: int) -> FlatModel:
    """One width of a run-time file as a file of its own, still with its shifts.

    Args:
        model: From :func:`unpack`; it is not changed.
        bits: A width that it has.
    """
    signature = next(each for each in model.signatureDefs if _text(each.signatureKey) == signature_of(bits))
    alone = schema.ModelT()
    vars(alone).update(vars(model))
    graph = copy.copy(model.subgraphs[signature.subgraphIndex])
    graph.tensors = [copy.copy(tensor) for tensor in graph.tensors]
    alone.subgraphs = [graph]
    alone.metadata = None
    alone.signatureDefs = [_signature(graph, _FIXED_SIGNATURE, 0)]
    return FlatModel(_serialised(alone))


def _width(flat: FlatModel, model: onnx.ModelProto, weights: Sequence[CodedWeight]) -> _Width:
    """Find the codes of one width, and make its fixed file on the way."""
    from tqexport.onnx_file import read_metadata
    from tqexport.tflite_export import LAYOUT, _check_operators, _name_tensors

    facts = {**read_metadata(model), "layout": LAYOUT}
    _check_operators(flat)
    _name_tensors(flat, [node.output[0] for node in model.graph.node if node.op_type == "Round"])
    fixed = copy.deepcopy(flat)
    put_codes_back(fixed, weights)  # raises where a layer is not found
    return _Width(flat, weights, _match(flat, weights), facts, finish_fixed(fixed, facts))


def _merge(parts: Mapping[int, _Width]) -> bytes:
    """Put the widths into one file, the widest first: it is what runs where nobody names a signature."""
    widths = sorted(parts)
    merged = schema.ModelT()
    merged.version, merged.description = 3, _DESCRIPTION
    merged.subgraphs, merged.operatorCodes, merged.signatureDefs = [], [], []
    merged.buffers = [schema.BufferT()]
    listed: dict[int, list[int]] = {}
    for bits in reversed(widths):
        flat = parts[bits].flat
        known = len(flat.model.operatorCodes)
        for match in parts[bits].matches:
            _shift_at_run_time(flat, match)
        listed[bits] = _append(merged, flat, signature_of(bits))[:known]
    every = [parts[bits] for bits in widths]
    facts = {
        **facts_by_width([part.facts for part in every]),
        WIDTHS: widths,
        DIGESTS: [hashlib.sha256(part.fixed).hexdigest() for part in every],
        WEIGHTS: [weight.name for weight in every[0].weights],
        OPERATOR_CODES: [listed[bits] for bits in widths],
    }
    affine = np.array(
        [
            [(weight.scale, weight.offset) for weight in column]
            for column in zip(*(part.weights for part in every), strict=True)
        ],
        np.float32,
    )
    _set_metadata(merged, {METADATA_NAME: json.dumps(facts, sort_keys=True).encode(), _AFFINE_NAME: affine.tobytes()})
    return _serialised(merged)


def _shift_at_run_time(flat: FlatModel, match: _Match) -> None:
    """Compute a filter from codes, shift, scale and offset, where the converter wrote it as float32."""
    weight = match.weight
    shape = [int(n) for n in flat.tensor(match.filter).shape]
    order = TO_TORCH[match.operator]
    codes = weight.codes.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    channels = np.ones(len(shape), np.int64)
    channels[_CHANNEL_AXIS[match.operator]] = -1

    def per_channel(value: float) -> npt.NDArray[np.float32]:
        return (match.gain * value).astype(np.float32).reshape(channels)

    stored = flat.add_constant(f"{weight.name}.codes", np.ascontiguousarray(codes))
    shift = flat.add_constant(f"{weight.name}.shift", np.array([weight.shift], np.uint8))
    shifted = flat.add_tensor(f"{weight.name}.shifted", shape, np.uint8)
    number = flat.add_tensor(f"{weight.name}.number", shape)
    scale = flat.add_constant(f"{weight.name}.scale", per_channel(weight.scale))
    scaled = flat.add_tensor(f"{weight.name}.scaled", shape)
    offset = flat.add_constant(f"{weight.name}.offset", per_channel(weight.offset))
    flat.tensor(match.filter).name, flat.tensor(match.filter).buffer = weight.name, 0

    cast = schema.CastOptionsT()
    cast.inDataType, cast.outDataType = schema.TensorType.UINT8, schema.TensorType.FLOAT32
    flat.graph.operators[:0] = [
        flat.operator("RIGHT_SHIFT", [stored, shift], shifted),
        flat.operator("CAST", [shifted], number, cast),
        flat.operator("MUL", [number, scale], scaled, schema.MulOptionsT()),
        flat.operator("ADD", [scaled, offset], match.filter, schema.AddOptionsT()),
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
    for tensor in flat.graph.tensors:
        tensor.buffer += len(merged.buffers)
    merged.buffers += flat.model.buffers
    merged.signatureDefs.append(_signature(flat.graph, signature, len(merged.subgraphs)))
    merged.subgraphs.append(flat.graph)
    return where


def _signature(graph: Any, key: str, index: int) -> Any:
    """A signature over all inputs and outputs of a subgraph, by the names of their tensors."""

    def entries(tensors: Sequence[int]) -> list[Any]:
        return [schema.TensorMapT(_text(graph.tensors[each].name), int(each)) for each in tensors]

    return schema.SignatureDefT(entries(graph.inputs), entries(graph.outputs), key, index)


def _operator_key(code: Any) -> tuple[int, int, int, bytes]:
    return code.builtinCode, code.deprecatedBuiltinCode, code.version, code.customCode or b""


def _set_metadata(model: Any, entries: Mapping[str, bytes]) -> None:
    model.metadata = []
    for name, content in entries.items():
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(content, np.uint8)
        entry.name, entry.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(entry)


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes equal strings and equal vectors once, and byte vectors where the schema wants them, at 16 bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: dict[tuple[str, bytes], int] = {}

    def CreateString(self, text: str | bytes, *args: Any, **kwargs: Any) -> int:  # noqa: N802 - the library's name
        key = ("text", text.encode() if isinstance(text, str) else text)
        if key not in self._written:
            self._written[key] = super().CreateString(text, *args, **kwargs)
        return self._written[key]

    def CreateNumpyVector(self, values: npt.NDArray[Any]) -> int:  # noqa: N802
        key = (values.dtype.str, values.tobytes())
        if key not in self._written:
            if values.dtype == np.uint8:
                self.Prep(16, len(values))  # what follows needs no more padding
            self._written[key] = super().CreateNumpyVector(values)
        return self._written[key]


def _serialised(model: Any) -> bytes:
    """Serialise with equal buffers stored once and none that nothing uses."""
    kept, where = [schema.BufferT()], {b"": 0}
    tensors = [tensor for graph in model.subgraphs for tensor in graph.tensors]
    for holder in (*tensors, *(model.metadata or [])):
        data = model.buffers[holder.buffer].data
        content = b"" if data is None else np.asarray(data, np.uint8).tobytes()
        if content not in where:
            where[content] = len(kept)
            kept.append(schema.BufferT(np.frombuffer(content, np.uint8)))
        holder.buffer = where[content]
    model.buffers = kept
    builder = _Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _run_every_signature(content: bytes, widths: Sequence[int]) -> None:
    """Run each width on zeros, with XNNPACK and without.

    Raises:
        ConversionError: One does not load, does not run, or gives NaN.
    """
    from tqexport.litert import open_interpreter

    for xnnpack in (True, False):
        for bits in widths:
            try:
                runner = open_interpreter(content, xnnpack=xnnpack).get_signature_runner(signature_of(bits))
                zeros = {
                    name: np.zeros(detail["shape"], detail["dtype"])
                    for name, detail in runner.get_input_details().items()
                }
                outputs = runner(**zeros).values()
            except (InputError, RuntimeError, ValueError) as error:
                raise ConversionError(f"LiteRT does not run the merged file at {bits} bits: {error}") from error
            if not all(np.isfinite(output).all() for output in outputs):
                raise ConversionError(f"the merged file gives NaN or infinity at {bits} bits on an input of zeros")


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
