"""Editing TFLite files: a thin layer over the flatbuffer schema's object API.

Knows tensors, buffers and operators; nothing of quantisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.packing import packed, unpacked
from tqexport.backends.tflite.door import check_tflite
from tqexport.backends.tflite.flatbuffer_writing import serialise
from tqexport.errors import ConversionError

__all__ = ["FlatModel", "Operator", "type_code"]

Operator = Any  # schema.OperatorT; the generated schema has no types

_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
_DTYPES: dict[int, type[np.generic]] = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.INT8: np.int8,
    schema.TensorType.UINT8: np.uint8,
    schema.TensorType.INT32: np.int32,
    schema.TensorType.INT64: np.int64,
}
_TYPES = {dtype: code for code, dtype in _DTYPES.items()}
_DTYPES[schema.TensorType.INT4] = np.int8  # as which its values are given here; two of them are a byte in the file


def type_code(dtype: np.dtype[Any]) -> int:
    """The schema's number of a data type."""
    return _TYPES[dtype.type]


def _custom_name(code: Any) -> str | None:
    """The name of a custom operator in the schema's table of operators; None of a builtin one."""
    return code.customCode.decode() if isinstance(code.customCode, bytes) else code.customCode


def _in_half_bytes(value: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Numbers of -8 to 7 as INT4 constants have them: two in a byte, the first of them in its lower half."""
    return packed(value.astype(np.int8).view(np.uint8).reshape(1, -1) & np.uint8(0xF), 4)


def _from_half_bytes(content: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    """The inverse of :func:`_in_half_bytes`, int8 (count,)."""
    top = unpacked(content.reshape(1, -1), 4, count) << np.uint8(4)
    return top.ravel().view(np.int8) >> 4  # with its sign


class FlatModel:
    """A TFLite file with one subgraph, unpacked for editing.

    Tensors are named by their index in the subgraph throughout.
    """

    def __init__(self, content: bytes) -> None:
        """Unpack a file.

        Raises:
            InputError: It is damaged.
            ConversionError: It is not a TFLite file with exactly one subgraph.
        """
        check_tflite(content)
        self.model: Any = schema.ModelT.InitFromPackedBuf(content, 0)
        if len(self.model.subgraphs) != 1:
            raise ConversionError(f"the TFLite file has {len(self.model.subgraphs)} subgraphs where one was expected")
        self.graph: Any = self.model.subgraphs[0]

    @classmethod
    def of(cls, model: Any) -> FlatModel:
        """The schema's model object, as it is."""
        flat = cls.__new__(cls)
        flat.model, flat.graph = model, model.subgraphs[0]
        return flat

    def operator_name(self, operator: Operator) -> str:
        """The builtin operator's name, e.g. ``CONV_2D``, or that of a custom one."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
        if builtin == schema.BuiltinOperator.CUSTOM:
            return _custom_name(code) or _NAMES[builtin]
        name: str = _NAMES[builtin]
        return name

    def tensor(self, index: int) -> Any:
        """The schema's tensor object."""
        return self.graph.tensors[index]

    def name(self, index: int) -> str:
        """Name of a tensor."""
        raw = self.tensor(index).name
        return raw.decode() if isinstance(raw, bytes) else str(raw)

    def shape(self, index: int) -> list[int]:
        """Shape of a tensor."""
        sizes = self.tensor(index).shape
        return [] if sizes is None else [int(n) for n in sizes]

    def dtype(self, index: int) -> np.dtype[Any]:
        """Data type of a tensor.

        Raises:
            KeyError: It is one that nothing here writes.
        """
        return np.dtype(_DTYPES[self.tensor(index).type])

    def constant(self, index: int) -> npt.NDArray[Any] | None:
        """Value of a constant tensor, or None where it is computed or of another type."""
        tensor = self.tensor(index)
        data = self.model.buffers[tensor.buffer].data
        dtype = _DTYPES.get(tensor.type)
        if data is None or dtype is None or len(data) == 0:
            return None
        content: npt.NDArray[Any] = np.asarray(data, np.uint8)
        if tensor.type == schema.TensorType.INT4:
            content = _from_half_bytes(content, int(np.prod(self.shape(index), dtype=np.int64)))
        return np.frombuffer(content.tobytes(), dtype).reshape(self.shape(index))

    def set_constant(self, index: int, value: npt.NDArray[Any]) -> None:
        """Give a constant tensor another value of the same shape and type; that of an INT4 one is int8 here."""
        int4 = self.tensor(index).type == schema.TensorType.INT4
        self.tensor(index).buffer = self.add_buffer((_in_half_bytes(value) if int4 else value).tobytes())

    def find(self, name: str) -> int | None:
        """The first tensor of a name, or None."""
        return next((index for index in range(len(self.graph.tensors)) if self.name(index) == name), None)

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs of the graph, in its order."""
        return [self.name(int(index)) for index in self.graph.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs of the graph, in its order."""
        return [self.name(int(index)) for index in self.graph.outputs]

    def consumers(self, index: int) -> list[Operator]:
        """The operators that read a tensor."""
        return [operator for operator in self.graph.operators if index in list(operator.inputs)]

    def add_buffer(self, content: bytes) -> int:
        """Append a buffer and return its index."""
        self.model.buffers.append(schema.BufferT(np.frombuffer(content, np.uint8)))
        return len(self.model.buffers) - 1

    def add_constant(self, name: str, value: npt.NDArray[Any]) -> int:
        """Append a constant tensor and return its index."""
        index = self.add_tensor(name, value.shape, value.dtype.type)
        self.tensor(index).buffer = self.add_buffer(value.tobytes())
        return index

    def add_tensor(self, name: str, shape: Sequence[int], dtype: type[np.generic] = np.float32) -> int:
        """Append a computed tensor and return its index."""
        self.graph.tensors.append(schema.TensorT(np.array(shape, np.int32), _TYPES[dtype], name=name))
        return len(self.graph.tensors) - 1

    def add_like(self, name: str, index: int, channels: int) -> int:
        """Append a computed float32 tensor shaped like another, with another number of channels."""
        source = self.tensor(index)
        new = self.add_tensor(name, [*source.shape[:-1], channels])
        if source.shapeSignature is not None:
            self.tensor(new).shapeSignature = np.array([*source.shapeSignature[:-1], channels], np.int32)
        return new

    def operator(
        self, kind: str, inputs: Sequence[int], output: int, options: Any = None, *, version: int = 1
    ) -> Operator:
        """Make an operator (without placing it).

        Args:
            kind: Builtin name, e.g. ``ADD``.
            inputs: Tensors it reads.
            output: The tensor it writes.
            options: The schema's options object of the operator.
            version: Operator version.
        """
        code = self._operator_code(getattr(schema.BuiltinOperator, kind), version)
        operator = schema.OperatorT(code, np.array(inputs, np.int32), np.array([output], np.int32))
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        return operator

    def custom_operator(self, name: str, inputs: Sequence[int], output: int) -> Operator:
        """Make an operator that the schema does not know (without placing it); a runtime finds it by its name."""
        custom = schema.BuiltinOperator.CUSTOM
        names = [_custom_name(code) for code in self.model.operatorCodes]
        if name not in names:
            self.model.operatorCodes.append(schema.OperatorCodeT(custom, name, 1, custom))
            names.append(name)
        return schema.OperatorT(names.index(name), np.array(inputs, np.int32), np.array([output], np.int32))

    def insert_before(self, anchor: Operator, operators: Sequence[Operator]) -> None:
        """Place operators in front of another one."""
        position = self._position(anchor)
        self.graph.operators[position:position] = operators

    def insert_after(self, anchor: Operator, operators: Sequence[Operator]) -> None:
        """Place operators behind another one."""
        position = self._position(anchor) + 1
        self.graph.operators[position:position] = operators

    def metadata(self, name: str) -> bytes | None:
        """One metadata entry, or None."""
        for entry in self.model.metadata or []:
            if entry.name in (name, name.encode()):
                data = self.model.buffers[entry.buffer].data
                return b"" if data is None else bytes(np.asarray(data, np.uint8))
        return None

    def pack(self) -> bytes:
        """Serialise, without the buffers that nothing uses any more and equal ones stored once."""
        return serialise(self.model)

    def _position(self, operator: Operator) -> int:
        """Where an operator stands; operators that are equal are told apart."""
        return next(i for i, other in enumerate(self.graph.operators) if other is operator)

    def _operator_code(self, builtin: int, version: int) -> int:
        """Index of an operator and version in the file's table, where it is entered if it is not there."""
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin and code.version >= version:
                return index
        self.model.operatorCodes.append(schema.OperatorCodeT(min(builtin, 127), None, version, builtin))
        return len(self.model.operatorCodes) - 1
