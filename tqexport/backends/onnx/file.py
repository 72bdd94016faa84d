"""The ONNX files that tqexport writes: which weights hold codes, and what else they say.

Needs onnx and numpy alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.base import TensorInfo
from tqexport.backends.coded_weight import CodedWeight
from tqexport.errors import InputError, about
from tqexport.facts import TEXT_FACTS, Facts, decode, encode
from tqexport.truncation import STORED_BITS

__all__ = [
    "activation_outputs",
    "coded_weights",
    "describe",
    "parse",
    "rebuild",
    "read_facts",
    "read_onnx",
    "shifted_codes",
    "write_facts",
]

INPUT_NAME = "input"
OUTPUT_NAME = "output"
BITS_NAME = "bits"  # the input of run-time files that chooses the width
METADATA_PREFIX = "tqexport."
CONSTANT_PREFIX = "constant/"  # initializers that belong to an operator, not to the network
LEVELS_SUFFIX = ".levels"  # the number of steps of an activation quantiser
_CODES = ".codes"
_NOT_VALID = "is not a valid ONNX file; export it again with tqexport onnx"


def read_onnx(path: Path) -> onnx.ModelProto:
    """Load and check a file; see :func:`parse`.

    Raises:
        InputError: Missing, empty, damaged, or with external data.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; export it again with tqexport onnx")
    with about(str(path)):
        return parse(path.read_bytes())


def parse(content: bytes) -> onnx.ModelProto:
    """Check a file's content; data outside of it is not read.

    Raises:
        InputError: Empty, damaged, or with external data.
    """
    try:
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise classes of their own, without a common base
        raise InputError(_NOT_VALID) from error
    if not model.graph.node or any(tensor.external_data for tensor in model.graph.initializer):
        raise InputError("is empty or keeps data outside of the file; export it again with tqexport onnx")
    return model


def describe(model: onnx.ModelProto) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Inputs and outputs of a file."""

    def info(value: onnx.ValueInfoProto) -> TensorInfo:
        tensor = value.type.tensor_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return TensorInfo(value.name, dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim))

    return tuple(map(info, model.graph.input)), tuple(map(info, model.graph.output))


def rebuild(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]) -> None:
    """Give a graph other nodes and initializers, which may be some of those that it has."""
    for field, values in ((graph.node, list(nodes)), (graph.initializer, list(initializers))):
        del field[:]
        field.extend(values)


def read_facts(model: onnx.ModelProto) -> Facts:
    """What a file says of itself, from its ``tqexport.*`` metadata.

    Raises:
        InputError: tqexport did not write it, or it was damaged.
    """
    record: dict[str, Any] = {}
    for entry in model.metadata_props:
        if entry.key.startswith(METADATA_PREFIX):
            key = entry.key.removeprefix(METADATA_PREFIX)
            try:
                record[key] = entry.value if key in TEXT_FACTS else json.loads(entry.value)
            except json.JSONDecodeError:
                record[key] = entry.value  # text that a format keeps in a table of its own
    return decode(record)


def write_facts(model: onnx.ModelProto, facts: Facts) -> None:
    """Make facts the whole metadata of a file, ordered by key."""
    record = {
        METADATA_PREFIX + key: value if isinstance(value, str) else json.dumps(value)
        for key, value in encode(facts).items()
    }
    onnx.helper.set_model_props(model, dict(sorted(record.items())))


def coded_weights(model: onnx.ModelProto) -> list[CodedWeight]:
    """The quantised weights of a fixed file, in graph order.

    Raises:
        InputError: There is none, or one is not followed by the shift, scale and offset that tqexport writes.
    """
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    width = next((entry.value for entry in model.metadata_props if entry.key == f"{METADATA_PREFIX}width"), None)
    coded: dict[str, CodedWeight] = {}
    for node in _shifts(model):
        name = node.input[0].removesuffix(_CODES)
        try:
            codes, shift, scale, offset = (
                numpy_helper.to_array(values[name + part]) for part in (_CODES, ".shift", ".scale", ".offset")
            )
        except KeyError as error:
            raise InputError(f"{node.name} was not written by tqexport: there is no initializer {error}") from error
        bits = int(width) if width is not None else STORED_BITS - int(shift)
        coded[name] = CodedWeight(name, codes, int(shift), float(scale), float(offset), bits)
    return list(coded.values())


def shifted_codes(model: onnx.ModelProto, bits: int) -> dict[str, list[npt.NDArray[np.uint8]]]:
    """The codes of each quantised weight at a width of a file, uint8 in PyTorch's layout; nothing is run.

    Raises:
        InputError: There is none.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    codes: dict[str, list[npt.NDArray[np.uint8]]] = {}
    for node in _shifts(model):
        # A run-time file gives the shift as it runs.
        shift = int(values[node.input[1]]) if node.input[1] in values else STORED_BITS - bits
        codes[node.input[0].removesuffix(_CODES)] = [values[node.input[0]] >> np.uint8(shift)]
    return codes


def _shifts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that shift codes."""
    shifts = [node for node in model.graph.node if node.op_type == "BitShift"]
    if not shifts:
        raise InputError("the ONNX file holds no BitShift node, so it was not written by tqexport")
    return shifts


def activation_outputs(model: onnx.ModelProto) -> list[str]:
    """The values that hold quantised activations as whole numbers 0 to ``M_a``, in the order they are computed.

    Named ``<module>/Round`` by the exporter; a module called again has ``<module>/Round_2``.
    """
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Round" and re.search(r"/Round(_\d+)?$", node.output[0])
    ]
