"""The ONNX files that tqexport writes: which weights hold codes, and what else they say.

Needs onnx and numpy alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.base import TensorInfo
from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.onnx.door import parse_onnx
from tqexport.errors import InputError
from tqexport.facts import TEXT_FACTS, Facts, MultiWidthFacts, decode, encode
from tqexport.reading.records import parse_json, whole
from tqexport.truncation import STORED_BITS

__all__ = [
    "activation_outputs",
    "coded_weights",
    "depending_on",
    "describe",
    "is_right_shift",
    "of_samples",
    "steps_in_front",
    "parse",
    "rebuild",
    "read_facts",
    "shifted_codes",
    "write_facts",
]

INPUT_NAME = "input"
OUTPUT_NAME = "output"
BATCH = "batch"  # what the number of samples is called where it is free
BITS_NAME = "bits"  # the input of run-time files that chooses the width
METADATA_PREFIX = "tqexport."
CONSTANT_PREFIX = "constant/"  # initializers that belong to an operator, not to the network
LEVELS_SUFFIX = ".levels"  # the number of steps of an activation quantiser
CODES = ".codes"
_NOT_VALID = "is not a valid ONNX file; export it again with tqexport onnx"


def parse(content: bytes) -> onnx.ModelProto:
    """Check a file's content; data outside of it is not read.

    Raises:
        InputError: Empty, damaged, or with external data.
    """
    model = parse_onnx(content)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises classes of its own, without a common base
        raise InputError(_NOT_VALID) from error
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
                record[key] = entry.value if key in TEXT_FACTS else parse_json(entry.value)
            except InputError:
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
    values = _constants(model)
    width = next((entry.value for entry in model.metadata_props if entry.key == f"{METADATA_PREFIX}width"), None)
    coded: dict[str, CodedWeight] = {}
    for node in _shifts(model):
        name = node.input[0].removesuffix(CODES)
        shift = _shift(values, f"{name}.shift")
        scale, offset = (float(_number(values, name + part)) for part in (".scale", ".offset"))
        if not scale or not math.isfinite(scale) or not math.isfinite(offset):
            raise InputError(f"gives {name} a scale of {scale} and an offset of {offset}; export it again")
        bits = STORED_BITS - shift if width is None else whole(parse_json(width), "width", 1, STORED_BITS)
        coded[name] = CodedWeight(name, _codes(values, name + CODES), shift, scale, offset, bits)
    return list(coded.values())


def shifted_codes(model: onnx.ModelProto, bits: int) -> dict[str, list[npt.NDArray[np.uint8]]]:
    """The codes of each quantised weight at a width of a file, uint8 in PyTorch's layout; nothing is run.

    Raises:
        InputError: There is none, or one is not as tqexport writes it.
    """
    values = _constants(model)
    codes: dict[str, list[npt.NDArray[np.uint8]]] = {}
    for node in _shifts(model):
        # A run-time file gives the shift as it runs.
        shift = _shift(values, node.input[1]) if node.input[1] in values else STORED_BITS - bits
        codes[node.input[0].removesuffix(CODES)] = [_codes(values, node.input[0]) >> np.uint8(shift)]
    return codes


def _codes(values: Mapping[str, npt.NDArray[Any]], name: str) -> npt.NDArray[np.uint8]:
    """Codes among the constants of a file."""
    codes = values.get(name)
    if codes is None or codes.dtype != np.uint8:
        raise InputError(f"has no codes {name}, so it was changed since its export; export it again")
    return codes


def _shift(values: Mapping[str, npt.NDArray[Any]], name: str) -> int:
    """By how many bits codes are shifted, 0 to 7."""
    shift = _number(values, name)
    if not 0 <= shift < STORED_BITS:
        raise InputError(f"shifts codes by {shift}, which leaves nothing of them; export it again")
    return int(shift)


def _number(values: Mapping[str, npt.NDArray[Any]], name: str) -> Any:
    """A constant of a file that is one number."""
    value = values.get(name)
    if value is None or value.size != 1:
        raise InputError(f"has no number {name}, so it was changed since its export; export it again")
    return value.item()


def is_right_shift(node: onnx.NodeProto) -> bool:
    """Whether a node truncates codes; packed files bring them to the top of their bytes with shifts to the left."""
    return node.op_type == "BitShift" and any(attribute.s == b"RIGHT" for attribute in node.attribute)


def _constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """The constants of a file by name, and the codes that it has packed, taken apart.

    Raises:
        InputError: They cannot be taken apart.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    apart: set[str] = set()
    for node in model.graph.node:
        starts = node.op_type == "BitShift" and not is_right_shift(node)
        if (starts or (node.op_type in ("Reshape", "Slice") and node.input[0] in apart)) and values.keys() >= {
            *node.input
        }:
            try:
                values[node.output[0]] = _UNPACKING[node.op_type](*(values[name] for name in node.input))
            except (ValueError, TypeError, IndexError, OverflowError) as error:
                raise InputError(f"{node.output[0]} cannot be computed from what is packed; export it again") from error
            apart.add(node.output[0])
    return values


def _codes_apart(stored: npt.NDArray[Any], places: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Bytes (n, 1) shifted to the left by each place; uint8 (n, codes in a byte)."""
    if places.size > STORED_BITS or stored.dtype != np.uint8:
        raise ValueError("these are no bytes with codes in them")
    return np.asarray(np.left_shift(stored, places))


# What stands between packed codes and their shift.
_UNPACKING: dict[str, Callable[..., npt.NDArray[Any]]] = {
    "BitShift": _codes_apart,
    "Reshape": np.reshape,
    "Slice": lambda value, start, end: value[int(start[0]) : int(end[0])],
}


def _shifts(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that truncate codes."""
    shifts = [node for node in model.graph.node if is_right_shift(node)]
    if not shifts:
        raise InputError("the ONNX file holds no BitShift node, so it was not written by tqexport")
    return shifts


def of_samples(model: onnx.ModelProto, *, sizes: bool) -> set[str]:
    """Names of the values that depend on the samples, or on the sizes of these alone if ``sizes`` is true."""
    inputs = (value.name for value in model.graph.input if len(value.type.tensor_type.shape.dim))  # not the width
    return depending_on(model, inputs, sizes=sizes)


def steps_in_front(model: onnx.ModelProto) -> Mapping[str, int]:
    """How many steps values have in front of their samples; see :class:`tqexport.facts.ArtifactFacts`."""
    try:
        facts = read_facts(model)
    except InputError:  # lost as the file was rewritten
        return {}
    of_a_width = next(iter(facts.by_width.values())) if isinstance(facts, MultiWidthFacts) else facts
    return of_a_width.steps_in_front  # those of every width


def depending_on(model: onnx.ModelProto, names: Iterable[str], *, sizes: bool) -> set[str]:
    """Some values and all that is computed from them, or from their sizes alone if ``sizes`` is true."""
    depending = {*names}
    for node in model.graph.node:
        if not depending.isdisjoint(node.input) and (sizes or node.op_type != "Shape"):
            depending.update(node.output)
    return depending


def activation_outputs(model: onnx.ModelProto) -> list[str]:
    """The values that hold quantised activations as whole numbers 0 to ``M_a``, in the order they are computed.

    Named ``<module>/Round`` by the exporter; a module called again has ``<module>/Round_2``.
    """
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Round" and re.search(r"/Round(_\d+)?$", node.output[0])
    ]
