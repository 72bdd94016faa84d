"""Fixed ONNX files that other widths can be cut from: a fixed file, and in its metadata what differs at other widths.

An ONNX file stores all eight bits of its codes at every width, and the fixed files of one network differ in small
initializers alone. Those of the other widths go into a metadata entry, which no runtime looks at: the graph is that of
the plain fixed file.

Needs onnx and numpy alone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from tqexport.backends.onnx.file import METADATA_PREFIX, read_metadata
from tqexport.backends.onnx.runtime_file import (
    BY_WIDTH,
    DIGESTS,
    POSITIONS,
    ROWS,
    TRUNCATABLE_FACTS,
    TRUNCATABLE_TO,
    FixedFile,
    check_switchable,
    encode_fact,
    facts_by_width,
    fixed_files,
)

__all__ = ["put_row", "truncatable_onnx", "without_tables"]


def truncatable_onnx(files: Iterable[tuple[int, bytes]], widths: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Give fixed ONNX files the tables of all other widths.

    Args:
        files: Width and content of every fixed file of one network, as
            :func:`tqexport.backends.onnx.export.export_onnx` makes them.
        widths: The widths to give tables to; each is one of ``files``.

    Yields:
        Each of ``widths`` with its file.

    Raises:
        UsageError: There is one width only.
        InputError: The codes may not be shifted, or the files do not share one graph.
    """
    contents = dict(sorted(files))
    parts = fixed_files(contents.items())
    check_switchable(tuple(parts), str(next(iter(parts.values())).facts.get("quantizer")) if parts else "truncquant")
    names = [tensor.name for tensor in onnx.load_from_string(next(iter(contents.values()))).graph.initializer]
    differing = [i for i, name in enumerate(names) if len({part.values[name] for part in parts.values()}) > 1]
    for bits in widths:
        model = onnx.load_from_string(contents[bits])
        others = [part for width, part in parts.items() if width != bits]
        rows = b"".join(part.values[names[i]] for part in others for i in differing)
        _describe(model, parts, {**parts[bits].facts, POSITIONS: differing, ROWS: base64.b64encode(rows).decode()})
        yield bits, model.SerializeToString(deterministic=True)


def put_row(model: onnx.ModelProto, facts: Mapping[str, Any], bits: int) -> None:
    """Give the initializers the values of another width.

    Args:
        model: A fixed file with tables; changed in place.
        facts: What it says of itself.
        bits: A width that it has tables for, or its own.
    """
    if bits == facts["width"]:
        return
    rows = base64.b64decode(facts[ROWS], validate=True)
    others = [width for width in facts[TRUNCATABLE_TO] if width != facts["width"]]
    start = others.index(bits) * (len(rows) // len(others))
    for position in facts[POSITIONS]:
        tensor = model.graph.initializer[position]
        length = len(tensor.raw_data)
        tensor.raw_data = rows[start : start + length]
        start += length


def without_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """The plain fixed file of a fixed file with tables; any other file as it is. Changes the model in place."""
    keys = {METADATA_PREFIX + fact for fact in TRUNCATABLE_FACTS}
    kept = [entry for entry in model.metadata_props if entry.key not in keys]
    if TRUNCATABLE_TO in read_metadata(model):
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
    return model


def _describe(model: onnx.ModelProto, parts: Mapping[int, FixedFile], facts: Mapping[str, Any]) -> None:
    described = {
        **facts,
        TRUNCATABLE_TO: list(parts),
        BY_WIDTH: facts_by_width([part.facts for part in parts.values()])[BY_WIDTH],
        DIGESTS: [part.sha256 for part in parts.values()],
    }
    helper.set_model_props(model, {METADATA_PREFIX + key: encode_fact(described[key]) for key in sorted(described)})
