"""From one artifact with several widths to the fixed file of one width, without the network it came from.

Run-time files hold several widths, and so do fixed files that were exported with ``--truncatable``. The result is,
byte for byte, what exporting the checkpoint at that width gives (without ``--truncatable``); the artifact carries the
hash of each fixed file, so a result that differs is never handed out. Needs numpy and onnx, and for TFLite files
flatbuffers and its schema: neither torch, nor TensorFlow, nor a runtime, nor the checkpoint.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tqexport.backends.onnx.file import METADATA_PREFIX, read_metadata
from tqexport.backends.onnx.runtime_file import (
    BITS_NAME,
    DIGESTS,
    PLACES,
    SWITCH_PREFIX,
    TRUNCATABLE_TO,
    WIDTHS,
    encode_fact,
    facts_of_width,
    table_names,
)
from tqexport.backends.onnx.truncatable import put_row
from tqexport.errors import ConversionError, InputError
from tqexport.truncation import WIDTHS as ALL_WIDTHS

__all__ = ["ArtifactWidths", "artifact_widths", "is_tflite", "truncate_file"]

_DAMAGED = "was changed or damaged since its export; export it again"


@dataclass(frozen=True)
class ArtifactWidths:
    """The widths in an artifact.

    Attributes:
        widths: Those that it can be run at or truncated to, ascending.
        own: The width that it computes with, where it is a fixed file.
        truncatable: Whether :func:`truncate_file` takes it.
    """

    widths: tuple[int, ...]
    own: int | None
    truncatable: bool


def truncate_file(source: Path | bytes, bits: int) -> bytes:
    """Cut an artifact with several widths down to one.

    Args:
        source: A run-time file written by tqexport (``NAME.onnx`` or ``NAME.tflite``), a fixed file with the tables of
            other widths (``--truncatable``), or the content of one.
        bits: A width that it holds.

    Returns:
        The content of ``NAME-wBITS.onnx`` or ``NAME-wBITS.tflite``, byte-identical to a direct export.

    Raises:
        InputError: The file is missing, damaged, was changed since its export, holds one width only, or lacks this one.
    """
    content, name = _read(source)
    try:
        return _truncate_tflite(content, bits) if is_tflite(content) else _truncate_onnx(content, bits)
    except InputError as error:
        raise InputError(f"{name} {error}") from error


def artifact_widths(source: Path | bytes) -> ArtifactWidths:
    """The widths that an artifact of tqexport holds.

    Raises:
        InputError: The file is missing or damaged, or tqexport did not write it.
    """
    content, name = _read(source)
    try:
        facts = _tflite_facts(content) if is_tflite(content) else read_metadata(_parse(content))
        own = None if WIDTHS in facts else _width(facts)
        several = WIDTHS in facts or TRUNCATABLE_TO in facts
        return ArtifactWidths(_widths(facts) if several else (_width(facts),), own, several)
    except InputError as error:
        raise InputError(f"{name} {error}") from error


def is_tflite(content: bytes) -> bool:
    """Whether a file's content is TFLite; otherwise it is taken for ONNX."""
    return content[4:8] == b"TFL3"


def _read(source: Path | bytes) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, "the file"
    try:
        return source.read_bytes(), str(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}") from error


def _parse(content: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise classes of their own, without a common base
        raise InputError("is not a valid ONNX or TFLite file; export it again") from error
    return model


def _widths(facts: Mapping[str, Any]) -> tuple[int, ...]:
    """The widths of a file that has several."""
    widths = facts[WIDTHS if WIDTHS in facts else TRUNCATABLE_TO]
    if not isinstance(widths, list) or not widths or any(bits not in ALL_WIDTHS for bits in widths):
        raise InputError(_DAMAGED)
    return tuple(map(int, widths))


def _width(facts: Mapping[str, Any]) -> int:
    """The width of a fixed file."""
    if facts.get("width") not in ALL_WIDTHS:
        raise InputError("was not written by tqexport: it does not say its width")
    return int(facts["width"])


def _row_of(facts: Mapping[str, Any], bits: int) -> int:
    """Row of a width in the tables of a file."""
    if WIDTHS not in facts and TRUNCATABLE_TO not in facts:
        what = f"one width only ({_bits(facts['width'])})" if "width" in facts else "no tables of tqexport"
        raise InputError(
            f"holds {what}, so no other width can be cut from it: each has scales and BatchNorm values of its own; "
            "make a file that holds them with --truncatable, or one for all widths with --bits runtime"
        )
    widths = _widths(facts)
    if bits not in widths:
        dropped = (
            f"; its codes were cut to {_bits(facts['width'])}, and a file of more bits can give what they lack"
            if bits in ALL_WIDTHS and WIDTHS not in facts and bits > max(widths)
            else ""
        )
        raise InputError(f"holds {', '.join(map(str, widths))} bits, so it cannot be truncated to {bits}{dropped}")
    return widths.index(bits)


def _bits(width: int) -> str:
    return f"{width} bit{'s' * (width != 1)}"


def _truncate_onnx(content: bytes, bits: int) -> bytes:
    model = _parse(content)
    facts = read_metadata(model)
    row = _row_of(facts, bits)
    with _damage():
        if WIDTHS in facts:
            _take_row(model.graph, facts[PLACES], row)
        else:
            put_row(model, facts, bits)
        fixed = facts_of_width(facts, row)
        helper.set_model_props(model, {METADATA_PREFIX + key: encode_fact(fixed[key]) for key in sorted(fixed)})
        return _proved(model.SerializeToString(deterministic=True), facts[DIGESTS][row])


def _truncate_tflite(content: bytes, bits: int) -> bytes:
    from tqexport.backends.tflite.file import unpack
    from tqexport.backends.tflite.truncate import fixed_tflite

    model, facts = unpack(content)
    row = _row_of(facts, bits)
    with _damage():
        if WIDTHS not in facts:
            from tqexport.backends.tflite.truncatable import run_time_model

            model, facts = run_time_model(content)
        return _proved(fixed_tflite(model, facts, facts_of_width(facts, row), bits), facts[DIGESTS][row])


def _tflite_facts(content: bytes) -> dict[str, Any]:
    from tqexport.backends.tflite.file import unpack

    return unpack(content)[1]


@contextmanager
def _damage() -> Iterator[None]:
    """Turn what a damaged file makes of the steps in the block into an error that says so."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, StopIteration, zlib.error, ConversionError) as error:
        raise InputError(_DAMAGED) from error


def _proved(content: bytes, digest: str) -> bytes:
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(_DAMAGED)
    return content


def _take_row(graph: onnx.GraphProto, places: Mapping[str, Any], row: int) -> None:
    """Replace the tables by the values of one width, and take the input ``bits`` away."""
    splits = {node.input[0]: list(node.output) for node in graph.node if node.op_type == "Split"}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    initializers = [tensor for tensor in graph.initializer if not tensor.name.startswith(SWITCH_PREFIX)]
    pieces: dict[int, onnx.TensorProto] = {}
    for dtype, where in places.items():
        table, split, sizes = table_names(dtype)
        lengths = numpy_helper.to_array(constants[sizes])
        values = np.split(numpy_helper.to_array(constants[table])[row], np.cumsum(lengths)[:-1])
        for number, value in enumerate(values):
            shaped = value.reshape(()) if number < where["scalars"] else value
            pieces[where["positions"][number]] = numpy_helper.from_array(shaped, splits[split][number])
    for position in sorted(pieces):
        initializers.insert(position, pieces[position])
    nodes = [node for node in graph.node if not _belongs_to_switch(node)]
    inputs = [value for value in graph.input if value.name != BITS_NAME]
    del graph.initializer[:], graph.node[:], graph.input[:]
    graph.initializer.extend(initializers)
    graph.node.extend(nodes)
    graph.input.extend(inputs)


def _belongs_to_switch(node: onnx.NodeProto) -> bool:
    return any(name == BITS_NAME or name.startswith(SWITCH_PREFIX) for name in node.input)
