"""Serialising TFLite models: no buffer that nothing uses, nothing equal twice, and constants aligned.

The subgraphs of one network at several widths are the same tensors and operators but for the constants, so most of
them are written once, too.

The schema wants the bytes of a buffer at a multiple of 16 (``force_align``), which the generated Python code does not
see to; kernels with vector loads on small processors rely on it.
"""

from __future__ import annotations

import copy
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

__all__ = ["serialise"]

_ALIGNMENT = 16


def serialise(model: Any) -> bytes:
    """Serialise the schema's model object.

    Args:
        model: A ``ModelT``, whatever its number of subgraphs. Its buffers are compacted in place.

    Returns:
        The file. Equal models give equal bytes.
    """
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
    builder.Finish((_sharing(model) if len(model.subgraphs) > 1 else model).Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _sharing(model: Any) -> Any:
    """A shallow copy of a model in which the equal tensors and operators of its subgraphs are one object."""
    known: dict[bytes, _Once] = {}

    def once(part: Any) -> _Once:
        alone = flatbuffers.Builder(256)
        alone.Finish(part.Pack(alone))
        return known.setdefault(bytes(alone.Output()), _Once(part))

    shared = copy.copy(model)
    shared.subgraphs = [copy.copy(graph) for graph in model.subgraphs]
    for graph in shared.subgraphs:
        graph.tensors = [once(tensor) for tensor in graph.tensors]
        graph.operators = [once(operator) for operator in graph.operators]
    return shared


class _Once:
    """A part of a model that is written where it is first met; later it is a reference to there."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self._offset: int | None = None

    def Pack(self, builder: flatbuffers.Builder) -> int:  # noqa: N802 - the generated code's name
        if self._offset is None:
            self._offset = int(self._part.Pack(builder))
        return self._offset


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes equal strings and equal vectors once, and byte vectors aligned."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._written: dict[tuple[str, bytes], int] = {}

    def CreateString(self, text: str | bytes, *args: Any, **kwargs: Any) -> int:  # noqa: N802 - the library's name
        key = ("text", text.encode() if isinstance(text, str) else text)
        if key not in self._written:
            self._written[key] = super().CreateString(text, *args, **kwargs)
        return self._written[key]

    def CreateNumpyVector(self, values: npt.NDArray[Any]) -> int:  # noqa: N802
        if values.dtype == np.uint8:  # the bytes of a buffer; equal ones are one buffer already
            self.Prep(_ALIGNMENT, len(values))
            return int(super().CreateNumpyVector(values))
        key = (values.dtype.str, values.tobytes())
        if key not in self._written:
            self._written[key] = super().CreateNumpyVector(values)
        return self._written[key]
