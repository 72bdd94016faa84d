"""The run-time file in ONNX: every width in one file, chosen as it runs by a scalar input ``bits``.

The fixed files of one network differ in nothing but the values of small initializers (shift, scale, activation levels,
BatchNorm) and in metadata. The run-time file is such a file in which those values are the rows of a table, one row per
width, for each element type: ``Gather`` takes the row that ``bits`` names, and ``Split`` gives its pieces the names
that the initializers had. The codes are there once; and taking one row by hand gives the fixed file of its width back,
byte for byte (``cutting.py``).

``bits`` reaches its row through two lookups: from width to row, where a width that the file lacks leads to a row that
does not exist, and over the rows that do. Either fails in the run, naming the widths, before anything is computed: so
ONNX defines Gather, and so onnxruntime's CPU provider has it. Providers that leave an index unchecked are not
supported.

Needs onnx and numpy alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tqexport.backends.onnx.file import BITS_NAME, read_facts, rebuild, write_facts
from tqexport.errors import ConversionError, InputError
from tqexport.facts import ArtifactFacts, MultiWidthFacts, check_mergeable
from tqexport.truncation import FLOAT_BITS, STORED_BITS

__all__ = ["FixedFile", "facts_of_files", "fixed_files", "merge_onnx", "table_names"]

SWITCH_PREFIX = f"{BITS_NAME}/"  # of every name that a run-time file has and a fixed one has not
SCALAR_PREFIX = f"{SWITCH_PREFIX}scalar/"  # of the names of pieces that lose their only dimension
_ROW = f"{SWITCH_PREFIX}row"
PLACES = "table_places"  # the fact that says, per table: positions of its pieces among the initializers, scalars


@dataclass(frozen=True)
class FixedFile:
    """A fixed file taken apart: what all widths must share, and what may differ.

    Attributes:
        skeleton: The serialised model without initializer values and metadata.
        values: By name, the bytes of each initializer.
        facts: What the file says of itself.
        sha256: Hash of the file, hex.
    """

    skeleton: bytes
    values: Mapping[str, bytes]
    facts: ArtifactFacts
    sha256: str


@dataclass(frozen=True)
class _Table:
    """Initializers of one element type that differ between widths, scalars first."""

    dtype: str
    positions: tuple[int, ...]
    tensors: tuple[onnx.TensorProto, ...]

    @property
    def scalars(self) -> int:
        """How many of them have no dimension; they come first."""
        return sum(not tensor.dims for tensor in self.tensors)


def merge_onnx(files: Iterable[tuple[int, bytes]]) -> bytes:
    """Merge the fixed ONNX files of one network into its run-time file.

    Args:
        files: Width and content of each, as :func:`tqexport.backends.onnx.export.export_onnx` makes them. They are
            taken one at a time, and what they share is kept once.

    Returns:
        The serialised, checked run-time file. The same files in any order give the same bytes.

    Raises:
        UsageError: Fewer than two widths.
        InputError: The codes may not be shifted, or the files do not share one graph.
        ConversionError: A name in the network is one that the run-time file needs.
    """
    parts = dict(sorted(fixed_files(files).items()))
    model = onnx.ModelProto.FromString(next(iter(parts.values())).skeleton)
    _check_names(model.graph)
    tables = _tables(model.graph, [part.values for part in parts.values()])
    _add_switch(model.graph, tables, parts)
    places = {table.dtype: {"scalars": table.scalars, "positions": table.positions} for table in tables}
    write_facts(model, facts_of_files(parts, {PLACES: places}))
    merged: bytes = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(merged, full_check=True)
    return merged


def fixed_files(files: Iterable[tuple[int, bytes]]) -> dict[int, FixedFile]:
    """Take the fixed ONNX files of one network apart.

    Args:
        files: See :func:`merge_onnx`.

    Raises:
        UsageError: Fewer than two widths.
        InputError: They do not share one graph, or their codes may not be shifted.
    """
    parts: dict[int, FixedFile] = {}
    first: FixedFile | None = None
    for bits, content in files:
        part = _take_apart(content, first)
        first = first or part
        if part.skeleton != first.skeleton:
            raise InputError(_different_graphs(first, part))
        parts[bits] = part
    check_mergeable(part.facts for part in parts.values())
    return parts


def facts_of_files(
    parts: Mapping[int, FixedFile], tables: Mapping[str, Any], own: int | None = None
) -> MultiWidthFacts:
    """What a file made of fixed files says of itself; see :class:`tqexport.facts.MultiWidthFacts`."""
    by_width = {bits: part.facts for bits, part in parts.items()}
    return MultiWidthFacts(by_width, {bits: part.sha256 for bits, part in parts.items()}, own, tables)


def table_names(dtype: str) -> tuple[str, str, str]:
    """Names of the table of an element type, of the row taken from it, and of the sizes of the row's pieces."""
    stem = f"{SWITCH_PREFIX}{dtype}"
    return f"{stem}/table", f"{stem}/row", f"{stem}/sizes"


def _take_apart(content: bytes, first: FixedFile | None) -> FixedFile:
    """Separate the values of a fixed file from its graph; values equal to those of ``first`` are shared with it."""
    model = onnx.load_from_string(content)
    facts = read_facts(model)
    if not isinstance(facts, ArtifactFacts):
        raise InputError("holds several widths already")
    values: dict[str, bytes] = {}
    for tensor in model.graph.initializer:
        # What does not differ is one object in memory, whatever the number of widths.
        known = first.values.get(tensor.name, b"") if first else b""
        values[tensor.name] = known if known == tensor.raw_data else tensor.raw_data
        tensor.ClearField("raw_data")
    del model.metadata_props[:]
    skeleton = model.SerializeToString(deterministic=True)
    return FixedFile(skeleton, values, facts, hashlib.sha256(content).hexdigest())


def _tables(graph: onnx.GraphProto, values: Sequence[Mapping[str, bytes]]) -> list[_Table]:
    """Take the initializers that differ out of the graph, and give the others their values."""
    differing: dict[str, list[tuple[int, onnx.TensorProto]]] = {}
    kept = []
    for position, tensor in enumerate(graph.initializer):
        value = values[0][tensor.name]
        if all(other[tensor.name] == value for other in values):
            tensor.raw_data = value
            kept.append(tensor)
            continue
        if len(tensor.dims) > 1:
            raise ConversionError(f"{tensor.name} differs between widths and is neither a scalar nor a vector")
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        differing.setdefault(dtype, []).append((position, tensor))
    tables = []
    for dtype, placed in sorted(differing.items()):
        positions, tensors = zip(*sorted(placed, key=lambda item: (len(item[1].dims), item[0])), strict=True)
        tables.append(_Table(dtype, positions, tensors))
    rebuild(graph, graph.node, kept)
    return tables


def _add_switch(graph: onnx.GraphProto, tables: Sequence[_Table], parts: Mapping[int, FixedFile]) -> None:
    """Put in front of the graph the input ``bits``, the operators that choose the row of a width, and the tables."""
    rows = np.arange(len(parts), dtype=np.int64)
    row_of_width = np.full(STORED_BITS + 1, len(parts), np.int64)
    row_of_width[list(parts)] = rows
    index, candidate, lookup, all_rows = (
        SWITCH_PREFIX + name for name in ("index", "candidate", "row_of_width", "rows")
    )
    constants = [numpy_helper.from_array(row_of_width, lookup), numpy_helper.from_array(rows, all_rows)]
    # onnxruntime's error names the node that failed, so the node's name is the message.
    message = f"bits must be one of {', '.join(map(str, parts))}"
    nodes = [
        helper.make_node("Cast", [BITS_NAME], [index], index, to=TensorProto.INT64),
        helper.make_node("Gather", [lookup, index], [candidate], f"{message} (above {STORED_BITS})", axis=0),
        helper.make_node("Gather", [all_rows, candidate], [_ROW], message, axis=0),  # nothing but a check
    ]
    for table in tables:
        name, row, sizes = table_names(table.dtype)
        pieces = [tensor.name for tensor in table.tensors]
        content = b"".join(part.values[piece] for part in parts.values() for piece in pieces)
        lengths = np.array([tensor.dims[0] if tensor.dims else 1 for tensor in table.tensors], np.int64)
        dims = [len(parts), int(lengths.sum())]
        constants.append(helper.make_tensor(name, table.tensors[0].data_type, dims, content, raw=True))
        constants.append(numpy_helper.from_array(lengths, sizes))
        nodes.append(helper.make_node("Gather", [name, _ROW], [row], row, axis=0))
        nodes.append(helper.make_node("Split", [row, sizes], pieces, f"{row}/Split", axis=0))
    rebuild(graph, (*nodes, *graph.node), (*graph.initializer, *constants))
    graph.input.append(helper.make_tensor_value_info(BITS_NAME, TensorProto.UINT8, []))


def _check_names(graph: onnx.GraphProto) -> None:
    """Refuse a network that uses a name which the run-time file needs."""
    taken = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    taken.update(name for node in graph.node for name in node.output)
    if clashes := sorted(name for name in taken if name == BITS_NAME or name.startswith(SWITCH_PREFIX)):
        raise ConversionError(
            f"the network has a module or tensor named {clashes[0]!r}, a name that run-time switching needs; rename it"
        )


def _different_graphs(one: FixedFile, other: FixedFile) -> str:
    """Why two widths cannot be in one file."""
    pair = (one.facts, other.facts)
    if len({facts.activation_width == FLOAT_BITS for facts in pair}) > 1:
        kinds = " and ".join(f"{facts.width} bits with {facts.activation_width}-bit activations" for facts in pair)
        why, advice = kinds, "choose widths whose activations are all quantised or all float (32 bits), or export"
    else:
        graphs = [onnx.ModelProto.FromString(file.skeleton).graph for file in (one, other)]
        names = [[value for node in graph.node for value in node.output] for graph in graphs]
        pairs = zip(pair, names, reversed(pair), reversed(names), strict=True)
        alone = [
            f"{name} is computed at {facts.width} bits and not at {without.width}"
            for facts, own, without, others in pairs
            for name in own
            if name not in others
        ]
        why, advice = (alone or ["their constants have other types or shapes"])[0], "export"
    return (
        f"the widths do not share one graph ({why}), so one file cannot switch between them; {advice} each width as a "
        "file of its own"
    )
