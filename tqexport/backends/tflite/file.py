"""The TFLite files that tqexport writes: what they say of themselves, and their signatures.

Needs numpy and flatbuffers alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.base import TensorInfo
from tqexport.backends.tflite.door import check_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.flatbuffer_writing import serialise
from tqexport.errors import ConversionError, InputError
from tqexport.facts import ArtifactFacts, Facts, MultiWidthFacts, decode, encode
from tqexport.reading.records import mapping, parse_json

__all__ = [
    "AFFINE",
    "DESCRIPTION",
    "METADATA_NAME",
    "OPERATOR_CODES",
    "WEIGHTS",
    "describe",
    "ends_by_name",
    "ends_of",
    "finish_fixed",
    "make_signature",
    "signature_of",
    "single_graph",
    "subgraph_of",
    "unpack",
]

DESCRIPTION = "tqexport"
METADATA_NAME = "tqexport"

# Facts of run-time files, which cutting a width needs.
WEIGHTS = "weights"  # names of the quantised weights, in the order of AFFINE
AFFINE = "affine"  # scale and offset of each weight at each width, float32 (weights, widths, 2)
OPERATOR_CODES = "operator_codes"  # per width: which of the operator codes its fixed file lists

_AFFINE_NAME = "tqexport.affine"  # an entry of its own, because as JSON it would be six times the size
_NO_FILE = "is not a valid TFLite file of tqexport; export it again"
_FIXED_SIGNATURE = "serving_default"
_TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if isinstance(code, int)}


def finish_fixed(flat: FlatModel, facts: ArtifactFacts) -> bytes:
    """Describe a fixed file whose codes are in place, and serialise it.

    Args:
        flat: The file.
        facts: What it says of itself.
    """
    # The converter leaves the signature out where TensorFlow cannot save the function first.
    flat.model.signatureDefs = [make_signature(flat.graph, _FIXED_SIGNATURE, 0)]
    describe(flat.model, facts)
    flat.model.description = DESCRIPTION
    return flat.pack()


def unpack(content: bytes) -> tuple[Any, Facts]:
    """The schema's model object of a file, and what the file says of itself.

    Raises:
        InputError: It is damaged, or tqexport did not write it.
    """
    check_tflite(content)
    try:
        reader = _Reader()
        reader.Init(content, flatbuffers.encode.Get(flatbuffers.packer.uoffset, content, 0))
        model: Any = schema.ModelT.InitFromObj(reader)
        model.subgraphs = _Subgraphs(reader)
        named = {_text(entry.name): model.buffers[entry.buffer].data for entry in model.metadata or []}
        record = mapping(parse_json(bytes(named[METADATA_NAME])), METADATA_NAME)
        if _AFFINE_NAME in named:
            affine = np.frombuffer(bytes(named[_AFFINE_NAME]), np.float32).reshape(len(record[WEIGHTS]), -1, 2)
            if not np.isfinite(affine).all() or not affine[..., 0].all():
                raise ValueError("a weight has no scale")
            record[AFFINE] = affine
    except Exception as error:  # the flatbuffer reader meets damage as whatever it happens to do first
        raise InputError(_NO_FILE) from error
    return model, _facts(record)


class _Reader(schema.Model):  # type: ignore[misc]
    """The generated reader, but it leaves the subgraphs packed; :class:`_Subgraphs` unpacks them."""

    def SubgraphsIsNone(self) -> bool:  # noqa: N802 - the generated code's name
        return True


class _Subgraphs(Sequence[Any]):
    """The subgraphs of a file, unpacked when asked for: who needs one width need not wait for eight."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._unpacked: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._reader.SubgraphsLength())

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._unpacked:
            try:
                self._unpacked[index] = schema.SubGraphT.InitFromObj(self._reader.Subgraphs(index))
            except Exception as error:  # damage shows as any exception, as in unpack()
                raise InputError(_NO_FILE) from error
        return self._unpacked[index]


def _entries(facts: Facts) -> dict[str, bytes]:
    """Facts as the metadata entries of a file; see :func:`unpack`."""
    record = encode(facts)
    affine = record.pop(AFFINE, None)
    entries = {METADATA_NAME: json.dumps(record, sort_keys=True).encode()}
    return entries | ({} if affine is None else {_AFFINE_NAME: affine.tobytes()})


def signature_of(bits: int) -> str:
    """Name of the signature of a width in a run-time file."""
    return f"w{bits}"


def describe(model: Any, facts: Facts) -> None:
    """Make facts the metadata of the schema's model object."""
    model.metadata, model.metadataBuffer = [], None
    for name, content in _entries(facts).items():
        model.metadata.append(schema.MetadataT(name, len(model.buffers)))
        model.buffers.append(schema.BufferT(np.frombuffer(content, np.uint8)))


def single_graph(content: bytes, bits: int | None) -> tuple[FlatModel, ArtifactFacts | None]:
    """The network of a width as a file of its own, and what the file says of it.

    Args:
        content: A file.
        bits: The width of a run-time file; None for a fixed file, which need not be of tqexport.

    Raises:
        InputError: It is damaged, or lacks the width.
    """
    if bits is not None:
        model, facts = unpack(content)
        if not isinstance(facts, MultiWidthFacts) or bits not in facts.by_width:
            raise InputError(f"the file has no signature for {bits} bits")
        return subgraph_of(model, bits), facts.by_width[bits]
    try:
        flat = FlatModel(content)
    except ConversionError as error:
        raise InputError(str(error)) from error
    record = flat.metadata(METADATA_NAME)
    described = _facts(mapping(parse_json(record), METADATA_NAME)) if record else None
    return flat, described.by_width[described.widths[-1]] if isinstance(described, MultiWidthFacts) else described


def ends_of(content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Inputs and outputs of a file, read without a runtime; those of the first signature where it has several.

    Raises:
        InputError: It is damaged.
    """
    graph = unpack(content)[0].subgraphs[0]

    def info(tensor: Any) -> TensorInfo:
        shape = tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature
        sizes = tuple("batch" if n < 0 else int(n) for n in (() if shape is None else shape))
        return TensorInfo(_text(tensor.name), _TYPES.get(tensor.type, "unknown"), sizes)

    inputs, outputs = (tuple(info(graph.tensors[i]) for i in part) for part in (graph.inputs, graph.outputs))
    return inputs, outputs


def ends_of_signature(content: bytes, bits: int) -> tuple[list[str], list[str]]:
    """Names of the inputs and of the outputs of a width in a run-time file, in the order of its graph.

    A signature has them by name alone, and a tool may have renamed them.

    Raises:
        InputError: The file has no such width.
    """
    for key, inputs, outputs in _signatures(content):
        if key == signature_of(bits):
            return inputs.in_order(), outputs.in_order()
    raise InputError(f"the file has no signature for {bits} bits")


def ends_by_name(content: bytes, bits: int | None) -> dict[str, int]:
    """By ``input NAME`` and ``output NAME``, which of the graph's a signature means; empty where there is none.

    Args:
        content: The file.
        bits: The width of a run-time file; None for the only network of a fixed file.
    """
    return {
        f"{part} {name}": ends.graph.index(index)
        for key, inputs, outputs in _signatures(content)
        if bits is None or key == signature_of(bits)
        for part, ends in (("input", inputs), ("output", outputs))
        for name, index in ends.named
    }


@dataclass(frozen=True)
class _Ends:
    """The inputs or the outputs of a network, by the numbers of their tensors.

    Attributes:
        named: What a signature calls them, and which they are.
        graph: Those of the network itself.
    """

    named: Sequence[tuple[str, int]]
    graph: Sequence[int]

    def in_order(self) -> list[str]:
        """Their names, in the order of the network."""
        names = {index: name for name, index in self.named}
        return [names[index] for index in self.graph]


def _signatures(content: bytes) -> Iterator[tuple[str, _Ends, _Ends]]:
    """The key of each signature, and what it calls the inputs and the outputs of its network."""
    model = schema.Model.GetRootAs(content)
    for signature in (model.SignatureDefs(i) for i in range(model.SignatureDefsLength())):
        graph = model.Subgraphs(signature.SubgraphIndex())
        given = (signature.Inputs(i) for i in range(signature.InputsLength()))
        returned = (signature.Outputs(i) for i in range(signature.OutputsLength()))
        inputs, outputs = (
            _Ends([(_text(entry.Name()), int(entry.TensorIndex())) for entry in part], [int(index) for index in ends])
            for part, ends in ((given, graph.InputsAsNumpy()), (returned, graph.OutputsAsNumpy()))
        )
        yield _text(signature.SignatureKey()), inputs, outputs


def _facts(record: dict[str, Any]) -> Facts:
    """What a record says; a file that version 0.1 made with ``--truncatable`` is the fixed file that it computes as."""
    return decode({key: value for key, value in record.items() if key != "truncatable_to"})


def subgraph_of(model: Any, bits: int) -> FlatModel:
    """One width of a run-time file as a file of its own, still with its shifts.

    Args:
        model: From :func:`unpack`; it is not changed.
        bits: A width that it has.

    Raises:
        InputError: It has no signature of that width.
    """
    alone = copy.copy(model)
    named = {_text(entry.signatureKey): entry for entry in model.signatureDefs or ()}
    signature = named.get(signature_of(bits))
    if signature is None:
        raise InputError(f"the file has no signature for {bits} bits; it is damaged, export it again")
    graph = copy.copy(model.subgraphs[signature.subgraphIndex])
    graph.tensors = [copy.copy(tensor) for tensor in graph.tensors]
    alone.subgraphs = [graph]
    alone.metadata = None
    alone.signatureDefs = [make_signature(graph, _FIXED_SIGNATURE, 0)]
    return FlatModel(serialise(alone))


def make_signature(graph: Any, key: str, index: int) -> Any:
    """A signature over all inputs and outputs of a subgraph, by the names of their tensors."""

    def entries(tensors: Sequence[int]) -> list[Any]:
        return [schema.TensorMapT(_text(graph.tensors[index].name), int(index)) for index in tensors]

    return schema.SignatureDefT(entries(graph.inputs), entries(graph.outputs), key, index)


def _text(name: str | bytes | None) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""
