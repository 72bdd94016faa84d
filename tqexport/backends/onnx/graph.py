"""An ONNX file as a graph that can be compared: operators, settings that mean something, and constants."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.graphs import Constant, Graph, Node, in_order
from tqexport.backends.onnx.file import rebuild

__all__ = ["drop_identities", "graph_of", "opset_of"]

Array = npt.NDArray[Any]

_WITHOUT_MEANING = {  # follow from the weight, or are for training
    ("Conv", "kernel_shape"),
    ("ConvTranspose", "kernel_shape"),
    ("BatchNormalization", "momentum"),
}
_BY_DEFAULT = {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0}  # in every dimension
_OF_ONNX = ("", "ai.onnx")  # the domain of ONNX's own operators has two names


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the operators of ONNX itself."""
    return next((entry.version for entry in model.opset_import if entry.domain in _OF_ONNX), 1)


def graph_of(model: onnx.ModelProto) -> Graph:
    """A file's graph. What an operator ``Constant`` gives is a constant like the others."""
    proto, opset = model.graph, opset_of(model)
    constants = {tensor.name: Constant(numpy_helper.to_array(tensor)) for tensor in proto.initializer}
    kept = []
    for node in proto.node:
        constant = _is(node, "Constant") and len(node.output) == 1 and node.attribute[:1]
        value = _constant(node.attribute[0]) if constant else None
        if value is None:
            kept.append(node)
        else:
            constants[node.output[0]] = Constant(value)
    nodes = [
        Node(_kind(node), _settings(node, opset), tuple(node.input), tuple(node.output), node)
        for node in kept
        if node.output
    ]
    given = tuple(value.name for value in proto.input if value.name not in constants)
    return Graph(given, tuple(value.name for value in proto.output), constants, in_order(nodes))


def drop_identities(proto: onnx.GraphProto) -> None:
    """Let a value have one name: all that reads another one of it reads the value itself, in place."""
    made = {name for node in proto.node for name in node.output}
    ends = {value.name for value in proto.output}
    same: dict[str, str] = {}

    def original(name: str) -> str:
        for _ in range(len(same)):  # ends on names in a circle, too
            name = same.get(name, name)
        return name

    kept = []
    for node in proto.node:
        if not _is(node, "Identity") or len(node.input) != 1 or len(node.output) != 1:
            kept.append(node)
            continue
        old, new = node.output[0], original(node.input[0])
        if old not in ends:
            same[old] = new
        elif new in made and new not in ends:
            same[new] = old
        else:
            kept.append(node)  # an output that is an input, a constant or another output
    rebuild(proto, kept, proto.initializer)
    for node in proto.node:
        node.input[:] = [original(name) if name in same else name for name in node.input]
        node.output[:] = [original(name) if name in same else name for name in node.output]


def _is(node: onnx.NodeProto, kind: str) -> bool:
    """Whether a node is an operator of ONNX itself."""
    return node.op_type == kind and not _domain(node)


def _domain(node: onnx.NodeProto) -> str:
    """The domain of a node's operator, empty for those of ONNX itself."""
    return "" if node.domain in _OF_ONNX else node.domain


def _kind(node: onnx.NodeProto) -> str:
    """The operator's name; a graph inside it is part of what it is."""
    inner = [each.SerializeToString(deterministic=True).hex() for each in node.attribute if each.HasField("g")]
    domain = _domain(node)
    return ":".join([domain, node.op_type, *inner]) if domain or inner else node.op_type


def _settings(node: onnx.NodeProto, opset: int) -> dict[str, object]:
    """The attributes that are not as they are by default."""
    defaults = _defaults(node.op_type, _domain(node), opset)
    settings = {}
    for attribute in node.attribute:
        name, value = attribute.name, _plain(attribute)
        usual = _BY_DEFAULT.get(name)
        in_every_dimension = usual is not None and isinstance(value, tuple) and all(part == usual for part in value)
        if (
            (node.op_type, name) in _WITHOUT_MEANING
            or in_every_dimension
            or (name in defaults and defaults[name] == value)
        ):
            continue
        settings[name] = value
    return settings


@functools.cache
def _defaults(kind: str, domain: str, opset: int) -> Mapping[str, object]:
    """The attributes of an operator that has none written down."""
    try:
        schema = onnx.defs.get_schema(kind, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    return {name: _plain(each.default_value) for name, each in schema.attributes.items() if each.default_value.name}


def _plain(attribute: onnx.AttributeProto) -> Any:
    """The value of an attribute, which can be compared."""
    value = onnx.helper.get_attribute_value(attribute)
    return tuple(map(_comparable, value)) if isinstance(value, list) else _comparable(value)


def _comparable(part: Any) -> Any:
    if isinstance(part, onnx.TensorProto):
        array = numpy_helper.to_array(part)
        return array.dtype.str, array.tolist()
    return part if part is None or isinstance(part, (int, float, bytes)) else str(part)


def _constant(attribute: onnx.AttributeProto) -> Array | None:
    """The value of an operator ``Constant``; None where it is not made of numbers."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    numbers = np.asarray(value) if isinstance(value, (int, float, list)) else None
    return numbers if numbers is not None and np.issubdtype(numbers.dtype, np.number) else None
