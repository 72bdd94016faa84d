"""One ONNX file for every width, switched while it runs by a scalar input ``bits``.

The fixed files of one network differ in nothing but the values of small initializers (shift, scale, activation levels,
BatchNorm) and in metadata. The run-time file is such a file in which those values are the rows of a table, one row per
width, for each element type: ``Gather`` takes the row that ``bits`` names, and ``Split`` gives its pieces the names
that the initializers had. The codes are there once; and taking one row by hand gives the fixed file of its width back,
byte for byte (:mod:`tqexport.artifacts.truncate`).

``bits`` reaches its row through two lookups: from width to row, where a width that the file lacks leads to a row that
does not exist, and over the rows that do. Either fails in the run, naming the widths, before anything is computed: so
ONNX defines Gather, and so onnxruntime's CPU provider has it. Providers that leave an index unchecked are not
supported.

Needs onnx and numpy alone, except for :func:`export_switchable_onnx`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tqexport.backends.onnx.file import METADATA_PREFIX, read_metadata
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.truncation import STORED_BITS

if TYPE_CHECKING:
    from tqexport.model import TruncModel

__all__ = [
    "AFFINE",
    "BITS_NAME",
    "BY_WIDTH",
    "DIGESTS",
    "OPERATOR_CODES",
    "PLACES",
    "POSITIONS",
    "ROWS",
    "SWITCH_FACTS",
    "SWITCH_PREFIX",
    "TRUNCATABLE_FACTS",
    "TRUNCATABLE_TO",
    "WEIGHTS",
    "WIDTHS",
    "FixedFile",
    "check_switchable",
    "encode_fact",
    "export_switchable_onnx",
    "facts_by_width",
    "facts_of_width",
    "fixed_files",
    "merge_onnx",
    "table_names",
]

BITS_NAME = "bits"
SWITCH_PREFIX = f"{BITS_NAME}/"  # of every name that a run-time file has and a fixed one has not
_ROW = f"{SWITCH_PREFIX}row"

# What files with several widths say of themselves besides what a fixed file does.
WIDTHS = "widths"  # run-time files: the widths that `bits` may have, ascending
TRUNCATABLE_TO = "truncatable_to"  # fixed files with tables: the widths that can be cut from it, ascending
BY_WIDTH = "by_width"  # facts of the fixed files that differ, each a list in the order of the widths
DIGESTS = "fixed_sha256"  # hashes of the fixed files, in the order of the widths
PLACES = "table_places"  # run-time ONNX, per table: positions of its pieces among the initializers, number of scalars
POSITIONS = "table_positions"  # fixed ONNX: which initializers differ between widths
ROWS = "tables"  # fixed ONNX: their values at each other width, one after the other, base64
WEIGHTS = "weights"  # run-time TFLite: names of the quantised weights, in the order of AFFINE
AFFINE = "affine"  # run-time TFLite: scale and offset of each weight at each width, float32 (weights, widths, 2)
OPERATOR_CODES = "operator_codes"  # run-time TFLite, per width: which of the operator codes its fixed file lists
TRUNCATABLE_FACTS = (TRUNCATABLE_TO, BY_WIDTH, DIGESTS, POSITIONS, ROWS)
SWITCH_FACTS = (WIDTHS, PLACES, WEIGHTS, AFFINE, OPERATOR_CODES, *TRUNCATABLE_FACTS)


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
    facts: Mapping[str, Any]
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


def export_switchable_onnx(model: TruncModel, widths: Sequence[int]) -> bytes:
    """Export a network to one ONNX file that holds several widths.

    Args:
        model: The reference network.
        widths: At least two widths that ``model`` has.

    Returns:
        The serialised, checked file. Inputs ``input`` float32 (N, ...) and ``bits`` uint8 scalar.

    Raises:
        UsageError: Fewer than two widths.
        InputError: The checkpoint lacks a width, its codes may not be shifted, or the widths need different graphs.
        ConversionError: The network cannot be captured.
    """
    from tqexport.backends.onnx.export import export_onnx

    check_switchable(widths, model.info.scheme.quantizer)
    return merge_onnx(export_onnx(model, tuple(sorted(set(widths)))))


def check_switchable(widths: Sequence[int], quantizer: str) -> None:
    """Refuse, before any slow work, what no file with several widths can hold.

    Raises:
        UsageError: Fewer than two widths.
        InputError: The codes of the quantiser may not be shifted.
    """
    if quantizer != "truncquant":
        raise InputError(
            f"one file of a network trained with {quantizer} cannot switch to other widths: its codes must not be "
            "shifted, so every width has codes of its own; export each width as a file of its own"
        )
    if len(set(widths)) < 2:
        raise UsageError("a file that gives several widths needs at least two widths")


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
    check_switchable(tuple(parts), str(next(iter(parts.values())).facts.get("quantizer")) if parts else "truncquant")
    model = onnx.ModelProto.FromString(next(iter(parts.values())).skeleton)
    _check_names(model.graph)
    tables = _tables(model.graph, [part.values for part in parts.values()])
    _add_switch(model.graph, tables, parts)
    _describe(model, tables, parts)
    merged: bytes = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(merged, full_check=True)
    return merged


def fixed_files(files: Iterable[tuple[int, bytes]]) -> dict[int, FixedFile]:
    """Take the fixed ONNX files of one network apart.

    Args:
        files: See :func:`merge_onnx`.

    Raises:
        InputError: They do not share one graph.
    """
    parts: dict[int, FixedFile] = {}
    first: FixedFile | None = None
    for bits, content in files:
        part = _take_apart(content, first)
        first = first or part
        if part.skeleton != first.skeleton:
            raise InputError(_different_graphs(first, part))
        parts[bits] = part
    return parts


def facts_by_width(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the fixed files say of themselves, as the run-time file says it.

    Args:
        every: The facts of each width, in the order of the widths; None stands for a fact that a width lacks.
    """
    keys = {key: None for facts in every for key in facts}
    shared = {key: value for key, value in every[0].items() if all(facts.get(key) == value for facts in every)}
    return {**shared, BY_WIDTH: {key: [facts.get(key) for facts in every] for key in keys if key not in shared}}


def facts_of_width(facts: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What the fixed file of the width in a row says of itself, from what a file with several says."""
    own = {key: value for key, value in facts.items() if key not in SWITCH_FACTS}
    return {**own, **{key: values[row] for key, values in facts[BY_WIDTH].items() if values[row] is not None}}


def encode_fact(value: Any) -> str:
    """A metadata value as ONNX files have it: plain text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def table_names(dtype: str) -> tuple[str, str, str]:
    """Names of the table of an element type, of the row taken from it, and of the sizes of the row's pieces."""
    stem = f"{SWITCH_PREFIX}{dtype}"
    return f"{stem}/table", f"{stem}/row", f"{stem}/sizes"


def _take_apart(content: bytes, first: FixedFile | None) -> FixedFile:
    model = onnx.load_from_string(content)
    facts = read_metadata(model)
    values: dict[str, bytes] = {}
    for tensor in model.graph.initializer:
        # Values that do not differ are kept once, whatever the number of widths.
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
    for dtype, found in sorted(differing.items()):
        positions, tensors = zip(*sorted(found, key=lambda item: (len(item[1].dims), item[0])), strict=True)
        tables.append(_Table(dtype, positions, tensors))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return tables


def _add_switch(graph: onnx.GraphProto, tables: Sequence[_Table], parts: Mapping[int, FixedFile]) -> None:
    """Put the input ``bits``, its way to a row, and the tables in front of the graph."""
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
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    graph.input.append(helper.make_tensor_value_info(BITS_NAME, TensorProto.UINT8, []))


def _describe(model: onnx.ModelProto, tables: Sequence[_Table], parts: Mapping[int, FixedFile]) -> None:
    facts = {
        **facts_by_width([part.facts for part in parts.values()]),
        WIDTHS: list(parts),
        DIGESTS: [part.sha256 for part in parts.values()],
        PLACES: {table.dtype: {"scalars": table.scalars, "positions": table.positions} for table in tables},
    }
    helper.set_model_props(model, {METADATA_PREFIX + key: encode_fact(facts[key]) for key in sorted(facts)})


def _check_names(graph: onnx.GraphProto) -> None:
    taken = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    taken.update(name for node in graph.node for name in node.output)
    if clashes := sorted(name for name in taken if name == BITS_NAME or name.startswith(SWITCH_PREFIX)):
        raise ConversionError(
            f"the network has a module or tensor named {clashes[0]!r}, a name that run-time switching needs; rename it"
        )


def _different_graphs(one: FixedFile, other: FixedFile) -> str:
    """Why two widths cannot be in one file."""
    kinds = " and ".join(
        f"{file.facts.get('width')} bits with {file.facts.get('activation_width')}-bit activations"
        for file in (one, other)
    )
    return (
        f"the widths do not share one graph ({kinds}), so one file cannot switch between them; choose widths whose "
        "activations are all quantised or all float (32 bits), or export each width as a file of its own"
    )
