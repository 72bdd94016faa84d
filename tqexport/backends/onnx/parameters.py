"""The constants, attributes and wiring of an ONNX file against those of a fresh export."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tqexport.backends.graphs import Constant, Graph, Node, fits_in_memory, fold, in_order
from tqexport.backends.onnx.file import parse, read_facts, rebuild
from tqexport.backends.onnx.integer_form import MOST_IN_FLOAT
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.onnx.truncatable import plain_file
from tqexport.backends.parameters import REWRITTEN, Parameters, different_facts, matched
from tqexport.errors import InputError
from tqexport.facts import ArtifactFacts, MultiWidthFacts

__all__ = ["compare_parameters", "without_roundings"]

Array = npt.NDArray[Any]

_PLAIN = {
    "BitShift",
    "Cast",
    "Clip",
    "Concat",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}  # round nothing, or one number
_FOLDED_KINDS = _PLAIN | {"Add", "Div", "Mul", "Sub"}
_FOLDED_TYPES = {*map(np.dtype, ("bool", "int8", "uint8", "int32", "int64", "float32", "float64"))}
_WITHOUT_MEANING = {  # follow from the weight, or are for training
    ("Conv", "kernel_shape"),
    ("ConvTranspose", "kernel_shape"),
    ("BatchNormalization", "momentum"),
}
_OLDEST_OPSET = 13  # before it, Softmax and others are other operators of the same name
_BY_DEFAULT = {"strides": 1, "dilations": 1, "pads": 0, "output_padding": 0}  # in every dimension
_OF_ONNX = ("", "ai.onnx")  # the domain of ONNX's own operators has two names
_CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}  # with the axis that counts output channels
_NORM_CONSTANTS = 4  # of a BatchNormalization: weight, bias, mean, variance


def compare_parameters(content: bytes, fresh: bytes, bits: int) -> Parameters:
    """Compare a file with a fresh export; see :meth:`tqexport.backends.base.Backend.compare_parameters`."""
    if content == fresh:
        return Parameters(content)
    model, expected = plain_file(parse(content)), plain_file(parse(fresh))
    for each in (model, expected):
        _drop_identities(each.graph)
    expected_facts = _facts(expected, bits)
    found = None
    if _opset(model) >= _OLDEST_OPSET:
        one, two = (_forms(_graph(each.graph, _opset(each))) for each in (expected, model))
        found = matched(one, two, expected_facts)
    differences = {} if expected_facts is None else different_facts(expected_facts, _facts(model, bits))
    if found is None:
        return Parameters(content, differences, REWRITTEN)
    return Parameters(_renamed(model, found.names), {**found.differences, **differences})


def without_roundings(content: bytes, bits: int | None) -> OnnxSession:
    """A file without its roundings of activations, so that all it computes is continuous."""
    model = parse(content)
    for node in model.graph.node:
        if node.op_type == "Round":
            node.op_type = "Identity"
    return OnnxSession(model.SerializeToString(), bits=bits)


def _facts(model: onnx.ModelProto, bits: int) -> ArtifactFacts | None:
    """What a file says of itself at a width; None where that was lost as it was rewritten."""
    try:
        facts = read_facts(model)
    except InputError:
        return None
    return facts.by_width.get(bits) if isinstance(facts, MultiWidthFacts) else facts


def _opset(model: onnx.ModelProto) -> int:
    """The version of the operators of ONNX itself."""
    return next((entry.version for entry in model.opset_import if entry.domain in _OF_ONNX), 1)


def _graph(proto: onnx.GraphProto, opset: int) -> Graph:
    """A file's graph."""
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


def _drop_identities(proto: onnx.GraphProto) -> None:
    """Let a value have one name: all that reads another one of it reads the value itself."""
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


def _forms(graph: Graph) -> tuple[Graph, ...]:
    """The graph in the forms of :func:`tqexport.backends.parameters.matched`."""
    folded = _with_float_biases(_without_ones(fold(graph, _computed)))
    return graph, folded, _with_norms_folded(folded)


def _with_float_biases(graph: Graph) -> Graph:
    """The graph with biases of whole numbers as the floats that these stand for, which onnxruntime may take them from.

    Their unit must be that of the layer, the product of the scales of its data and of its weights: onnxruntime takes
    the whole numbers as they are, whatever unit the file gives them.
    """
    makers = {output: node for node in graph.nodes for output in node.outputs}
    constants = dict(graph.constants)

    def scale(value: str) -> Array | None:
        """The scales of a value that is de-quantised with constant ones."""
        maker = makers.get(value)
        known = constants.get(maker.inputs[1]) if maker and maker.kind == "DequantizeLinear" else None
        return None if known is None else known.value

    for node in graph.nodes:
        if node.kind not in ("Conv", "Gemm") or len(node.inputs) != 3:
            continue
        data, weights, units = map(scale, node.inputs)
        if data is None or weights is None or units is None or data.size != 1:
            continue
        name, _, *zero_points = makers[node.inputs[2]].inputs
        whole, in_units = constants.get(name), np.array_equal(units, data.reshape(()) * weights)
        if (
            whole is not None
            and whole.value.dtype == np.int32
            and (np.abs(whole.value.astype(np.int64)) <= MOST_IN_FLOAT).all()
            and in_units
            and not zero_points
        ):
            constants[node.inputs[2]] = Constant(whole.value.astype(np.float32) * units)
    return replace(graph, constants=constants, nodes=[node for node in graph.nodes if node.outputs[0] not in constants])


def _with_norms_folded(graph: Graph) -> Graph:
    """The graph with each BatchNorm in the convolution before it."""
    readers: dict[str, int] = {}
    for name in (*graph.outputs, *(name for node in graph.nodes for name in node.inputs)):
        readers[name] = readers.get(name, 0) + 1
    constants = dict(graph.constants)
    nodes: dict[str, Node] = {}  # by the first value that each writes
    for node in graph.nodes:
        before = nodes.get(node.inputs[0]) if node.kind == "BatchNormalization" else None
        norm = [constants[name] for name in node.inputs[1:] if name in constants]
        folded = node
        if (
            before
            and readers[node.inputs[0]] == 1
            and len(norm) == _NORM_CONSTANTS
            and _can_be_folded(before, constants)
        ):
            epsilon = float(str(node.settings.get("epsilon", 1e-5)))
            values = [constants[name] for name in before.inputs[1:]]
            names = tuple(f"{node.outputs[0]}/{part}" for part in ("weight", "bias"))
            constants.update(zip(names, _with_norm(values, norm, epsilon, _CONVOLUTIONS[before.kind]), strict=True))
            folded = Node(before.kind, before.settings, (before.inputs[0], *names), node.outputs, before.source)
            del nodes[node.inputs[0]]
        nodes[node.outputs[0]] = folded
    return replace(graph, constants=constants, nodes=[_with_bias(node, constants) for node in nodes.values()])


def _without_ones(graph: Graph) -> Graph:
    """The graph without products and quotients by the number 1, as the steps of 1 bit are."""
    ones = {
        name
        for name, constant in graph.constants.items()
        if constant.value.dtype == np.float32 and not constant.value.ndim and constant.value == 1
    }
    same: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        inputs = tuple(same.get(name, name) for name in node.inputs)
        left = [name for name in inputs if name not in ones]
        by_one = node.kind in _OPERATIONS and inputs[0] not in ones and inputs[1] in ones
        if (by_one or (node.kind == "Mul" and len(left) == 1)) and node.outputs[0] not in graph.outputs:
            same[node.outputs[0]] = inputs[0] if by_one else left[0]
        else:
            nodes.append(replace(node, inputs=inputs))
    return replace(graph, nodes=nodes)


def _can_be_folded(node: Node, constants: Mapping[str, Constant]) -> bool:
    """Whether a BatchNorm behind an operator can become part of it."""
    grouped = node.settings.get("group", 1) != 1
    return (
        node.kind in _CONVOLUTIONS
        and all(name in constants for name in node.inputs[1:])
        and not (node.kind == "ConvTranspose" and grouped)
    )


def _with_norm(values: Sequence[Constant], norm: Sequence[Constant], epsilon: float, axis: int) -> list[Constant]:
    """Weight and bias of a convolution that a BatchNorm is part of, with the magnitude of their terms."""
    gain, shift, mean, variance = (part.value.astype(np.float64) for part in norm)
    with np.errstate(invalid="ignore", divide="ignore"):  # of a file's own numbers; NaN equals nothing
        factor = gain / np.sqrt(variance + epsilon)
    weight, bias = values[0], values[1] if len(values) > 1 else Constant(np.zeros_like(shift, np.float32))
    by_channel = factor.reshape([-1 if i == axis else 1 for i in range(weight.value.ndim)])
    summed = shift + (bias.value - mean) * factor
    terms = np.abs(shift) + (bias.terms() + np.abs(mean)) * np.abs(factor)
    return [
        Constant((weight.value * by_channel).astype(np.float32), weight.terms() * np.abs(by_channel)),
        Constant(summed.astype(np.float32), terms),
    ]


def _with_bias(node: Node, constants: dict[str, Constant]) -> Node:
    """A convolution with a bias, of zeros where it had none."""
    if node.kind not in _CONVOLUTIONS or len(node.inputs) != 2 or node.inputs[1] not in constants:
        return node
    weight = constants[node.inputs[1]].value
    grouped = node.kind == "ConvTranspose" and node.settings.get("group", 1) != 1
    if weight.ndim < 2 or grouped:
        return node
    name = f"{node.outputs[0]}/bias"
    constants[name] = Constant(np.zeros(weight.shape[_CONVOLUTIONS[node.kind]], weight.dtype))
    return Node(node.kind, node.settings, (*node.inputs, name), node.outputs, node.source)


def _computed(node: Node, values: Sequence[Constant]) -> Constant | None:
    """The result of an operator on constants, as ONNX's reference computes it.

    Of types that every runtime rounds alike alone: onnxruntime takes float64 to float16 by way of float32.
    """
    if node.kind not in _FOLDED_KINDS or not fits_in_memory([constant.value for constant in values]):
        return None
    try:
        result = _evaluate(node, [constant.value for constant in values])
        if not {result.dtype, *(constant.value.dtype for constant in values)} <= _FOLDED_TYPES:
            return None
        terms = [constant.terms() for constant in values]
        if node.kind in ("Add", "Sub"):
            return Constant(result, terms[0] + terms[1])
        if node.kind in ("Mul", "Div"):
            with np.errstate(all="ignore"):
                return Constant(result, np.abs(_OPERATIONS[node.kind](*terms)))
        if node.kind in ("Squeeze", "Unsqueeze", "Reshape", "Transpose"):
            return Constant(result, _evaluate(node, [terms[0], *(constant.value for constant in values[1:])]))
    except Exception:  # the reference raises whatever numpy raises; the operator stays as it is
        return None
    return Constant(result)


_OPERATIONS = {"Mul": np.multiply, "Div": np.divide}


def _evaluate(node: Node, values: Sequence[Array]) -> Array:
    """The one result of an operator of a file."""
    reference: Any = ReferenceEvaluator(node.source)
    return np.asarray(reference.run(None, dict(zip(node.source.input, values, strict=True)))[0])


def _renamed(model: onnx.ModelProto, names: Mapping[str, str]) -> bytes:
    """A file whose values have the names that a fresh export gives them; its inputs and outputs keep theirs."""
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    given: dict[str, str] = {}
    taken = {*ends, ""}
    for name, new in names.items():
        if name and name not in ends:
            given[name] = new if new not in taken else f"{new}/again_{len(given)}"
            taken.add(given[name])

    def rename(values: Iterable[str]) -> list[str]:
        return [name if name in ends or not name else given.get(name, f"rewritten/{name}") for name in values]

    for tensor in model.graph.initializer:
        (tensor.name,) = rename([tensor.name])
    for node in model.graph.node:
        node.input[:], node.output[:] = rename(node.input), rename(node.output)
    del model.graph.value_info[:]  # of the names of before
    content: bytes = model.SerializeToString(deterministic=True)
    return content
