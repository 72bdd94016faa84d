"""Checking an ONNX file before anything reads it: sizes, texts, shapes, and nothing that lies outside of it.

``onnx.checker`` and onnxruntime check what operators mean. They look at data outside of a file if it names some, and
leave to their readers whether a tensor has as many bytes as its shape says.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto

from tqexport.errors import InputError
from tqexport.reading import limits

__all__ = ["parse_onnx"]

_NOT_VALID = "is not a valid ONNX file"
_AGAIN = "export it again with tqexport onnx"
_BITS: dict[int, int] = {  # of an element, of the types that a network may compute with
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4), 4),
    **dict.fromkeys((TensorProto.BOOL, TensorProto.INT8, TensorProto.UINT8), 8),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16, TensorProto.UINT16), 16),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64), 64),
}
_VALUES: dict[int, str] = {  # where a tensor's values are if neither in raw_data nor in int32_data
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    **dict.fromkeys((TensorProto.UINT32, TensorProto.UINT64), "uint64_data"),
    TensorProto.INT64: "int64_data",
}


def parse_onnx(content: bytes) -> onnx.ModelProto:
    """The model of a file that asks for no more than files do.

    Raises:
        InputError: It is damaged, keeps data outside of itself, or there is more in it than
            :mod:`tqexport.reading.limits` allow.
    """
    try:
        model = onnx.load_from_string(content)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise InputError(f"{_NOT_VALID}; {_AGAIN}") from error
    try:
        for count, message in enumerate(_messages(model)):
            if count > 20 * limits.NODES:
                raise InputError(f"describes more than {20 * limits.NODES:,} parts; it may be made to harm")
            if isinstance(message, TensorProto):
                _check_tensor(message)
    except UnicodeDecodeError as error:
        raise InputError(f"{_NOT_VALID}: a name in it is damaged; {_AGAIN}") from error
    if not model.graph.node:
        raise InputError(f"{_NOT_VALID}: it has no operator; {_AGAIN}")
    if model.functions:  # which may compute anything under the name of an operator
        raise InputError(f"defines functions of its own, such as {model.functions[0].name}; inline them, or {_AGAIN}")
    if len(model.graph.node) > limits.NODES:
        raise InputError(f"has more than {limits.NODES:,} operators; it may be made to harm")
    for value in (*model.graph.input, *model.graph.output):
        _check_type(value.name, value.type.tensor_type.elem_type)  # 0, which is no type, of what is no tensor
    for node in model.graph.node:
        if any(attribute.ref_attr_name for attribute in node.attribute):
            raise InputError(f"{_NOT_VALID}: an attribute of {node.op_type} stands for one of a function; {_AGAIN}")
    return model


def _messages(model: onnx.ModelProto) -> Iterator[Message]:
    """Every message in a model; protobuf itself bounds how deep they are.

    Raises:
        UnicodeDecodeError: A text in it is not UTF-8.
    """
    waiting: list[Message] = [model]
    while waiting:
        message = waiting.pop()
        yield message
        if isinstance(message, TensorProto):
            continue
        for kind, value in message.ListFields():
            values = [value] if isinstance(value, (str, bytes, int, float, Message)) else value
            if kind.type == kind.TYPE_MESSAGE:
                waiting += values
            elif kind.type == kind.TYPE_STRING:
                for text in values:
                    _check_text(text)


def _check_text(text: Any) -> None:
    """Protobuf gives the bytes of a text that is not UTF-8, or raises."""
    if isinstance(text, bytes):
        text.decode()


def _check_tensor(tensor: onnx.TensorProto) -> None:
    """Refuse a tensor that has not as many values as its shape says, or has them elsewhere."""
    for text in (tensor.name, tensor.doc_string):
        _check_text(text)
    if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
        raise InputError(f"is empty or keeps data outside of the file; {_AGAIN}")
    if tensor.HasField("segment"):
        raise InputError(f"holds a part of {tensor.name or 'a tensor'} alone; {_AGAIN}")
    shape, kind = list(tensor.dims), tensor.data_type
    name = tensor.name or "a tensor"
    _check_type(name, kind)
    if (
        len(shape) > limits.DIMENSIONS
        or any(size < 0 for size in shape)
        or prod(filter(None, shape)) > limits.FILE_BYTES
    ):
        raise InputError(f"{_NOT_VALID}: {name} has the shape {shape[: limits.DIMENSIONS]}; {_AGAIN}")
    expected = -(-prod(shape) * _BITS[kind] // 8)
    if tensor.HasField("raw_data"):
        stored = len(tensor.raw_data)
    else:
        stored = len(getattr(tensor, _VALUES.get(kind, "int32_data")))
        expected = expected if _BITS[kind] < 8 else prod(shape)  # below 8 bits there are several in a value
    if stored != expected:
        raise InputError(f"{_NOT_VALID}: {name} of shape {shape} has not as many values; {_AGAIN}")


def _check_type(name: str, kind: int) -> None:
    """Refuse a value of a type that there is not, or that no network computes with."""
    if kind not in _BITS:
        there_is = kind in TensorProto.DataType.values()
        title = TensorProto.DataType.Name(kind) if there_is else f"number {kind}"
        raise InputError(f"{_NOT_VALID}: {name} has the type {title}, which no network here computes with; {_AGAIN}")
