"""Fixed ONNX files that other widths can be cut from: a fixed file, and in its metadata what differs at other widths.

An ONNX file stores all eight bits of its codes at every width, and the fixed files of one network differ in small
initializers alone. Those of the other widths go into a metadata entry, which no runtime looks at: the graph is that of
the plain fixed file.

Needs onnx and numpy alone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence

import onnx

from tqexport.backends.onnx.file import read_facts, write_facts
from tqexport.backends.onnx.runtime_file import facts_of_files, fixed_files
from tqexport.facts import MultiWidthFacts

__all__ = ["plain_file", "put_row", "truncatable_onnx"]

# Facts of such a file.
_POSITIONS = "table_positions"  # which initializers differ between widths
_ROWS = "tables"  # their values at each other width, one after the other, base64


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
    names = [tensor.name for tensor in onnx.load_from_string(next(iter(contents.values()))).graph.initializer]
    differing = [i for i, name in enumerate(names) if len({part.values[name] for part in parts.values()}) > 1]
    for bits in widths:
        model = onnx.load_from_string(contents[bits])
        others = [part for width, part in parts.items() if width != bits]
        rows = b"".join(part.values[names[i]] for part in others for i in differing)
        tables = {_POSITIONS: differing, _ROWS: base64.b64encode(rows).decode()}
        write_facts(model, facts_of_files(parts, tables, bits))
        yield bits, model.SerializeToString(deterministic=True)


def put_row(model: onnx.ModelProto, facts: MultiWidthFacts, bits: int) -> None:
    """Give the initializers the values of another width.

    Args:
        model: A truncatable file; changed in place.
        facts: What it says of itself.
        bits: One of its widths.
    """
    if bits == facts.own:
        return
    rows = base64.b64decode(facts.tables[_ROWS], validate=True)
    others = [width for width in facts.widths if width != facts.own]
    start = others.index(bits) * (len(rows) // len(others))
    for position in facts.tables[_POSITIONS]:
        tensor = model.graph.initializer[position]
        length = len(tensor.raw_data)
        tensor.raw_data = rows[start : start + length]
        start += length


def plain_file(model: onnx.ModelProto) -> onnx.ModelProto:
    """A truncatable file without its tables; any other file as it is. Changes the model in place."""
    facts = read_facts(model)
    if isinstance(facts, MultiWidthFacts) and facts.own is not None:
        write_facts(model, facts.by_width[facts.own])
    return model
