"""Checking a TFLite file before anything reads it: offsets, indices, shapes and sizes.

LiteRT's Python package has no verifier of flatbuffers, and LiteRT itself trusts offsets and indices: on damaged files
it dies. So the tables that make up a network are walked here by the schema. Nothing is copied, and each table is looked
at once however often it is shared, so a right file takes milliseconds. What kernels do with the numbers of a file that
is whole is for a process of its own (:mod:`tqexport.reading.apart`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tqexport.errors import InputError
from tqexport.layer_kinds import FILTER_OPERATORS
from tqexport.reading import limits

__all__ = ["check_tflite"]

# The schema (tensorflow/compiler/mlir/lite/schema/schema.fbs): by table, what its offsets lead to, by field number. A
# number stands for a vector of numbers of so many bytes, "text" for a string, a name for a table, and a name in
# brackets for a vector of tables. Fields that are not here hold no offset; those of "Options" are read by nobody here.
_SCHEMA: dict[str, dict[int, Any]] = {
    "Model": {
        **{1: ["OperatorCode"], 2: ["SubGraph"], 3: "text", 4: ["Buffer"], 5: 4, 6: ["Metadata"], 7: ["SignatureDef"]},
        **{8: ["Group"], 9: ["External"]},
    },
    "OperatorCode": {1: "text"},
    "SubGraph": {0: ["Tensor"], 1: 4, 2: 4, 3: ["Operator"], 4: "text"},
    "Tensor": {0: 4, 3: "text", 4: "Grid", 6: "Sparsity", 7: 4, 9: ["Variant"]},
    "Grid": {0: 4, 1: 4, 2: 4, 3: 8, 5: "Options"},
    "Sparsity": {0: 4, 1: 4, 2: ["Dimension"]},
    "Dimension": {3: "Options", 5: "Options"},
    "Variant": {0: 4},
    "Operator": {1: 4, 2: 4, 4: "Options", 5: 1, 7: 1, 8: 4, 12: "Options"},
    "Options": {},
    "Buffer": {0: 1},
    "Metadata": {0: "text"},
    "SignatureDef": {0: ["TensorMap"], 1: ["TensorMap"], 2: "text"},
    "TensorMap": {0: "text"},
    "Group": {0: "text"},
    "External": {4: "text"},
}
_BITS = {  # of an element; of types that are not here a tensor's buffer is not measured
    schema.TensorType.INT4: 4,
    **dict.fromkeys((schema.TensorType.INT8, schema.TensorType.UINT8, schema.TensorType.BOOL), 8),
    **dict.fromkeys((schema.TensorType.FLOAT16, schema.TensorType.INT16, schema.TensorType.UINT16), 16),
    **dict.fromkeys((schema.TensorType.FLOAT32, schema.TensorType.INT32, schema.TensorType.UINT32), 32),
    **dict.fromkeys((schema.TensorType.FLOAT64, schema.TensorType.INT64, schema.TensorType.UINT64), 64),
}
_OPERATORS = {code for code in vars(schema.BuiltinOperator).values() if isinstance(code, int)}
_CALLS = {  # operators that run another network of the file, and may do so without end
    getattr(schema.BuiltinOperator, name)
    for name in ("CALL", "CALL_ONCE", "IF", "WHILE", "STABLEHLO_WHILE", "STABLEHLO_COMPOSITE", "STABLEHLO_CASE")
    if hasattr(schema.BuiltinOperator, name)
}
_OPERANDS = {  # how many inputs operators have at least, of those that are looked at here
    **dict.fromkeys((getattr(schema.BuiltinOperator, name) for name in FILTER_OPERATORS), 2),
    **dict.fromkeys((getattr(schema.BuiltinOperator, name) for name in ("ADD", "SUB", "MUL", "DIV", "RIGHT_SHIFT")), 2),
    **dict.fromkeys((getattr(schema.BuiltinOperator, name) for name in ("CAST", "DEQUANTIZE", "ROUND")), 1),
}
_DAMAGED = "is not a valid TFLite file"


@functools.lru_cache(maxsize=2)  # each step of a command opens the file anew
def check_tflite(content: bytes) -> None:
    """Refuse a file whose structure is damaged, or that asks for more than files do.

    Raises:
        InputError: An offset leads out of the file, an index is of nothing, a constant has not as many bytes as its
            shape says, or there is more than :mod:`tqexport.reading.limits` allow.
    """
    if content[4:8] != b"TFL3":
        raise InputError(f"{_DAMAGED}; export it again")
    try:
        _Walk(content).table(struct.unpack_from("<I", content)[0], "Model")
        model = schema.Model.GetRootAs(content, 0)
        _check_model(model, len(content))
    except (
        struct.error,
        UnicodeDecodeError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
    ) as error:
        raise InputError(f"{_DAMAGED}: it is damaged; export it again") from error


class _Walk:
    """Follows every offset of the tables in a file."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._tables: dict[tuple[int, str], int] = {}  # by place and kind, how many tables it stands for
        self._texts: set[int] = set()

    def table(self, place: int, kind: str) -> int:
        """Check a table and all below it; returns how many tables that is, those shared counted again.

        The schema has no circle, so its depth is that of the schema.
        """
        known = self._tables.get((place, kind))
        if known is not None:
            return known
        fields = _SCHEMA[kind]
        (back,) = self._unpack("<i", place)
        (length, size) = self._unpack("<HH", place - back)
        self._within(place - back, length)
        self._within(place, size)
        if length < 4 or length % 2 or size < 4:
            raise InputError(f"{_DAMAGED}: a table in it is damaged; export it again")
        count = 1
        for number in range((length - 4) // 2):
            (offset,) = self._unpack("<H", place - back + 4 + 2 * number)
            if offset and (offset < 4 or offset >= size):
                raise InputError(f"{_DAMAGED}: a table in it is damaged; export it again")
            if offset and number in fields:
                count += self._follow(place + offset, fields[number])
        if count > limits.TABLES:
            raise InputError(f"describes more than {limits.TABLES:,} parts; it may be made to harm")
        self._tables[place, kind] = count
        return count

    def _follow(self, place: int, kind: Any) -> int:
        """Check what an offset leads to; returns how many tables that is."""
        (offset,) = self._unpack("<I", place)
        target = place + offset
        if isinstance(kind, str) and kind != "text":
            return self.table(target, kind)
        (length,) = self._unpack("<I", target)
        if kind == "text":
            self._text(target + 4, length)
            return int(length) >> 6  # a long name that many share is as much work as many tables
        if isinstance(kind, int):
            self._within(target + 4, length * kind)
            return 0
        self._within(target + 4, 4 * length)
        count = 0
        for number in range(length):
            entry = target + 4 + 4 * number
            count += self.table(entry + self._unpack("<I", entry)[0], kind[0])
            if count > limits.TABLES:
                raise InputError(f"describes more than {limits.TABLES:,} parts; it may be made to harm")
        return count

    def _text(self, place: int, length: int) -> None:
        self._within(place, length)
        if place not in self._texts:
            self._content[place : place + length].decode()
            self._texts.add(place)

    def _within(self, place: int, length: int) -> None:
        if place < 0 or place + length > len(self._content):
            raise InputError(
                f"{_DAMAGED}: a part of it lies outside of the file, which may be truncated; copy it again"
            )

    def _unpack(self, layout: str, place: int) -> tuple[Any, ...]:
        if place < 0:  # which Python counts from the end
            raise InputError(
                f"{_DAMAGED}: a part of it lies outside of the file, which may be truncated; copy it again"
            )
        return struct.unpack_from(layout, self._content, place)


def _check_model(model: Any, size: int) -> None:
    """The indices of a model, whose tables lie in the file."""
    if model.ExternalBuffersLength() or model.ExternalBufferGroupsLength():
        raise InputError("keeps data outside of the file; export it again")
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    for buffer in buffers:
        if buffer.Offset() > 1 or buffer.Size() > 1:  # of data behind the flatbuffer, which files above 2 GB have
            raise InputError("keeps data behind its tables, as only files above 2 GB do; export it again")
    kinds = []
    for i in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(i)
        kinds.append(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()))
        if kinds[-1] not in _OPERATORS:
            raise InputError(f"{_DAMAGED}: it lists an operator that there is not; export it again")
        if {code.BuiltinCode(), code.DeprecatedBuiltinCode()} & _CALLS:
            raise InputError("runs networks within networks, which no file of tqexport does; export it again")
    lengths = [buffer.DataLength() for buffer in buffers]
    graphs = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    if not graphs or not lengths:
        raise InputError(f"{_DAMAGED}: it holds no network; export it again")
    for i in range(model.MetadataLength()):
        _index(model.Metadata(i).Buffer(), lengths, "a metadata entry")
    measured: dict[int, tuple[int, int]] = {}
    seen: set[tuple[int, int]] = set()
    for graph in graphs:
        _check_graph(graph, lengths, kinds, size, measured, seen)
    for i in range(model.SignatureDefsLength()):
        signature = model.SignatureDefs(i)
        place = _index(signature.SubgraphIndex(), graphs, "a signature")
        for entry_at, count, ends in (
            (signature.Inputs, signature.InputsLength(), graphs[place].InputsAsNumpy()),
            (signature.Outputs, signature.OutputsLength(), graphs[place].OutputsAsNumpy()),
        ):
            named = [entry_at(j).TensorIndex() for j in range(count)]
            if {*named} != {int(index) for index in ends} or len(named) != len(ends):
                raise InputError("has a signature of other inputs or outputs than its network; export it again")


def _check_graph(
    graph: Any,
    lengths: Sequence[int],
    kinds: Sequence[int],
    size: int,
    measured: dict[int, tuple[int, int]],
    seen: set[tuple[int, int]],
) -> None:
    """Tensors and operators of one network; what networks share is looked at once."""
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    constants = values = 0
    for tensor in tensors:
        place = tensor._tab.Pos
        if place not in measured:
            length = lengths[_index(tensor.Buffer(), lengths, "a tensor")]
            _check_tensor(tensor, length)
            shape = [int(n) for n in _numbers(tensor.ShapeAsNumpy())]
            measured[place] = length, 0 if length else _bytes_of(shape, tensor.Type())
        constants += measured[place][0]
        values += measured[place][1]
    if constants > max(64 << 20, 8 * size):  # what tensors share is one buffer, and each reader copies it
        raise InputError("uses the same constants so often that they fill memory; it may be made to harm")
    if not tensors or not graph.OperatorsLength():
        raise InputError(f"{_DAMAGED}: its network computes nothing; export it again")
    if graph.OperatorsLength() > limits.NODES:
        raise InputError(f"has more than {limits.NODES:,} operators; it may be made to harm")
    for ends in (graph.InputsAsNumpy(), graph.OutputsAsNumpy()):
        if not len(_numbers(ends)):
            raise InputError(f"{_DAMAGED}: its network has no input or no output; export it again")
        _indices(ends, len(tensors), lowest=0)
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        if (operator._tab.Pos, len(tensors)) in seen:
            continue
        seen.add((operator._tab.Pos, len(tensors)))
        kind = kinds[_index(operator.OpcodeIndex(), kinds, "an operator")]
        _indices(operator.InputsAsNumpy(), len(tensors), lowest=-1)  # -1 stands for an input that is left out
        _indices(operator.OutputsAsNumpy(), len(tensors), lowest=0)
        _indices(operator.IntermediatesAsNumpy(), len(tensors), lowest=-1)
        if operator.OutputsLength() == 0 or operator.InputsLength() < _OPERANDS.get(kind, 1):
            raise InputError(f"{_DAMAGED}: an operator in it lacks an input or an output; export it again")
        if operator.LargeCustomOptionsOffset() > 1:
            raise InputError("keeps data behind its tables, as only files above 2 GB do; export it again")
    _check_order(graph, [measured[tensor._tab.Pos][0] for tensor in tensors])
    if values > limits.VALUES_BYTES:
        at_once = _most_at_once(graph, [measured[tensor._tab.Pos][1] for tensor in tensors])
        if at_once > limits.VALUES_BYTES:
            raise InputError(
                f"computes values of {at_once:,} bytes at once, more than {limits.VALUES_BYTES:,}; "
                "it is damaged or made to harm, or its batch is too large"
            )


def _check_order(graph: Any, lengths: Sequence[int]) -> None:
    """Refuse a value that has two makers, or is read in front of its maker: runtimes go by the order in the file.

    Args:
        graph: The network, whose indices are right.
        lengths: Bytes of each tensor's buffer, 0 of one that is computed.
    """
    operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    made = [int(index) for operator in operators for index in _numbers(operator.OutputsAsNumpy())]
    given = {int(index) for index in graph.InputsAsNumpy()}
    if len({*made}) < len(made) or any(index in given or lengths[index] for index in made):
        raise InputError(f"{_DAMAGED}: a value in it is computed twice, or is a constant too; export it again")
    waiting = {*made}
    for operator in operators:
        if not waiting.isdisjoint(int(index) for index in _numbers(operator.InputsAsNumpy())):
            raise InputError(f"{_DAMAGED}: a value in it is read before it is computed; export it again")
        waiting.difference_update(int(index) for index in _numbers(operator.OutputsAsNumpy()))


def _most_at_once(graph: Any, sizes: Sequence[int]) -> int:
    """How many bytes the values of a network take where they are most, if each is kept until it was read last.

    Args:
        graph: The network, whose indices are right.
        sizes: Bytes of each tensor.
    """
    ends = {int(index) for numbers in (graph.InputsAsNumpy(), graph.OutputsAsNumpy()) for index in numbers}
    uses: list[set[int]] = []
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        numbers = [_numbers(each) for each in (operator.InputsAsNumpy(), operator.OutputsAsNumpy())]
        uses.append({int(index) for index in np.concatenate(numbers) if index >= 0} - ends)
    last = {index: i for i, used in enumerate(uses) for index in used}
    now = most = sum(sizes[index] for index in ends)
    seen: set[int] = set()
    for i, used in enumerate(uses):
        now += sum(sizes[index] for index in used - seen)
        seen |= used
        most = max(most, now)
        now -= sum(sizes[index] for index in used if last[index] == i)
    return most


def _check_tensor(tensor: Any, length: int) -> None:
    """Shape and grid of a tensor with a buffer of so many bytes."""
    shape = [int(n) for n in _numbers(tensor.ShapeAsNumpy())]
    name = (tensor.Name() or b"").decode()
    if any(n < 0 for n in shape) or any(int(n) < -1 for n in _numbers(tensor.ShapeSignatureAsNumpy())):
        raise InputError(f"{_DAMAGED}: {name} has the shape {shape}; export it again")
    if tensor.Sparsity() is not None:
        raise InputError(f"keeps {name} as a sparse tensor, which no file of tqexport does; export it again")
    if length and tensor.Type() in _BITS and _bytes_of(shape, tensor.Type()) != length:
        raise InputError(f"{_DAMAGED}: {name} of shape {shape} has {length:,} bytes; export it again")
    grid = tensor.Quantization()
    if grid is None:
        return
    scales, points = _numbers(grid.ScaleAsNumpy()), _numbers(grid.ZeroPointAsNumpy())
    axis = grid.QuantizedDimension()
    channels = shape[axis] if 0 <= axis < len(shape) else 1
    if len(scales) not in (0, 1, channels) or len(points) not in (0, 1, len(scales)):
        raise InputError(f"{_DAMAGED}: {name} has {len(scales)} scales for {channels} channels; export it again")


def _bytes_of(shape: Sequence[int], kind: int) -> int:
    """Bytes of a tensor; a byte for each element of types that are not measured."""
    return -(-prod(shape) * _BITS.get(kind, 8) // 8)


def _numbers(vector: Any) -> Any:
    """A vector of numbers; the generated code gives 0 for one that is not there."""
    return vector if isinstance(vector, np.ndarray) else np.empty(0, np.int64)


def _indices(vector: Any, count: int, lowest: int) -> None:
    """Refuse indices of nothing."""
    numbers = _numbers(vector)
    if len(numbers) and not (lowest <= int(numbers.min()) and int(numbers.max()) < count):
        raise InputError(f"{_DAMAGED}: it reads or writes a tensor that it does not have; export it again")


def _index(index: int, of: Any, what: str) -> int:
    """An index of something that is there."""
    if not 0 <= index < len(of):
        raise InputError(f"{_DAMAGED}: {what} refers to what it does not have; export it again")
    return int(index)
