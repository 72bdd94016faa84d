"""One TFLite file for every width: a signature per width, and one copy of the codes.

TFLite has no gather over whole networks, but a file may hold several subgraphs, and any number of tensors may read one
buffer. So ``w1`` to ``w8`` are subgraphs of their own, with their own scales, BatchNorm values and activation levels,
and each shifts the same uint8 codes::

    codes -> RIGHT_SHIFT -> CAST -> MUL (scale per channel) -> ADD (offset per channel) -> CONV_2D, ...

Float layers have their weights once, too (:mod:`tqexport.backends.tflite.float_layers`). All of it runs at every
inference, for whoever wants one file and no other tool. A fixed file of any width, with the form that is quick on a
device, can be had from it byte for byte (:mod:`tqexport.backends.tflite.truncate`).

Needs numpy and flatbuffers alone, except for :func:`convert_to_switchable_tflite`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.artifacts.manifest import Kernel
from tqexport.backends.onnx.file import CodedWeight, read_metadata
from tqexport.backends.onnx.runtime_file import (
    AFFINE,
    DIGESTS,
    OPERATOR_CODES,
    WEIGHTS,
    WIDTHS,
    check_switchable,
    facts_by_width,
)
from tqexport.backends.tflite.codes import _CHANNEL_AXIS, TO_TORCH, _Match, _match, put_codes_back
from tqexport.backends.tflite.file import DESCRIPTION, describe, finish_fixed, make_signature, signature_of
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.flatbuffer_writing import serialise
from tqexport.backends.tflite.float_layers import store_filters_once
from tqexport.errors import ConversionError, InputError

if TYPE_CHECKING:
    import onnx

    from tqexport.backends.tflite.export import FloatNetwork

__all__ = ["convert_to_switchable_tflite", "merge_tflite"]


@dataclass(frozen=True)
class _Width:
    """What is left to know of a width whose subgraph is in the run-time file."""

    weights: Mapping[str, CodedWeight]
    facts: Mapping[str, Any]
    operator_codes: Sequence[int]  # where those of its fixed file are in the run-time file
    fixed: bytes


def convert_to_switchable_tflite(
    models: Sequence[onnx.ModelProto], kernel: Kernel = "exact"
) -> tuple[bytes, dict[int, bytes]]:
    """Convert the fixed ONNX files of one network to its run-time TFLite file.

    It takes one sample at a time, channels last (NHWC). Widths need not share an activation kind here.

    Args:
        models: The fixed files, at least two widths.
        kernel: That of the fixed files, those that come with it and those that it can be truncated to; the run-time
            file itself computes with float weights. See :func:`tqexport.backends.tflite.codes.put_codes_back`.

    Returns:
        The run-time file, loaded and tried; and by width, ascending, the fixed TFLite files, which come with it.

    Raises:
        UsageError: Fewer than two widths.
        InputError: The codes may not be shifted.
        ConversionError: As :func:`tqexport.backends.tflite.export.convert_to_tflite`.
    """
    from tqexport.backends.tflite.export import run_once

    content, fixed = merge_tflite(models, kernel)
    _run_every_signature(content, tuple(fixed))
    for each in fixed.values():
        run_once(each)
    return content, fixed


def merge_tflite(models: Sequence[onnx.ModelProto], kernel: Kernel = "exact") -> tuple[bytes, dict[int, bytes]]:
    """As :func:`convert_to_switchable_tflite`, but the files have not been loaded and tried."""
    from tqexport.backends.tflite.export import float_networks
    from tqexport.backends.tflite.template import parameters

    by_width = {int(read_metadata(model)["width"]): model for model in models}
    check_switchable(tuple(by_width), str(read_metadata(models[0]).get("quantizer")) if models else "truncquant")
    # The widest first: it is what runs where nobody names a signature.
    by_width = dict(sorted(by_width.items(), reverse=True))
    merged = _empty()
    added = {
        bits: _add_width(merged, bits, network, parameters(model), kernel)
        for (bits, model), network in zip(by_width.items(), float_networks(list(by_width.values())), strict=True)
    }
    widths = dict(sorted(added.items()))
    _describe(merged, widths)
    return serialise(merged), {bits: width.fixed for bits, width in widths.items()}


def _empty() -> Any:
    merged = schema.ModelT()
    merged.version, merged.description = 3, DESCRIPTION
    merged.buffers = [schema.BufferT()]
    merged.subgraphs, merged.operatorCodes, merged.signatureDefs = [], [], []
    return merged


def _add_width(
    merged: Any, bits: int, network: FloatNetwork, values: Mapping[str, npt.NDArray[np.float32]], kernel: Kernel
) -> _Width:
    """Make the fixed file of one width, and put its network, with the shift in it, into the run-time file."""
    flat, weights, facts = network.flat, network.weights, {**network.facts, "kernel": kernel}
    fixed = copy.deepcopy(flat)
    put_codes_back(fixed, weights, kernel)  # raises where a layer is not found
    listed = len(flat.model.operatorCodes)
    matches = _match(flat, weights)
    store_filters_once(flat, values)
    for match in matches:
        _shift_at_run_time(flat, match)
    where = _append(merged, flat, signature_of(bits))
    return _Width({weight.name: weight for weight in weights}, facts, where[:listed], finish_fixed(fixed, facts))


def _describe(merged: Any, widths: Mapping[int, _Width]) -> None:
    every = list(widths.values())
    names = list(every[0].weights)
    affine = [[(w.scale, w.offset) for w in (width.weights[name] for width in every)] for name in names]
    facts = {
        **facts_by_width([width.facts for width in every]),
        WIDTHS: list(widths),
        DIGESTS: [hashlib.sha256(width.fixed).hexdigest() for width in every],
        WEIGHTS: names,
        AFFINE: np.array(affine, np.float32),
        OPERATOR_CODES: [list(width.operator_codes) for width in every],
    }
    describe(merged, facts)


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
    return code.builtinCode, code.deprecatedBuiltinCode, code.version, code.customCode or b""


def _run_every_signature(content: bytes, widths: Sequence[int]) -> None:
    """Run each width on zeros, with XNNPACK and without.

    Raises:
        ConversionError: One does not load, does not run, or gives NaN.
    """
    from tqexport.backends.tflite.session import open_interpreter

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
