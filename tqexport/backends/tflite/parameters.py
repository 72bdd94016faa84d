"""The constants, options and wiring of a TFLite file against those of a fresh export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.graphs import Constant, Graph, Node, fits_in_memory, fold, in_order
from tqexport.backends.parameters import REWRITTEN, Parameters, different_facts, matched
from tqexport.backends.tflite.file import ends_by_name, signature_of, single_graph, unpack
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator
from tqexport.backends.tflite.flatbuffer_writing import serialise
from tqexport.backends.tflite.layout import batch_to_channels_last
from tqexport.backends.tflite.session import LiteRTSession

__all__ = ["compare_parameters", "without_roundings"]

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

Array = npt.NDArray[Any]

_TYPES = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.INT32: np.int32, schema.TensorType.UINT8: np.uint8}
_OTHER_OPTIONS = ("customOptions", "builtinOptions2")
_FOLDED_KINDS = {"ADD": np.add, "MUL": np.multiply, "DIV": np.divide, "RIGHT_SHIFT": np.right_shift}


def compare_parameters(content: bytes, fresh: bytes, bits: int, *, switched: bool) -> Parameters:
    """Compare a file with a fresh export; see :meth:`tqexport.backends.base.Backend.compare_parameters`."""
    if content == fresh:
        return Parameters(content)
    width = bits if switched else None
    expected, expected_facts = single_graph(fresh, width)
    flat, facts = single_graph(content, width)
    one, two = _graph(expected), _graph(flat)
    found = matched((one, _folded(one)), (two, _folded(two)), expected_facts)
    differences = {} if expected_facts is None else different_facts(expected_facts, facts)
    differences |= _different_signature(fresh, content, width)
    if found is None:
        return Parameters(content, differences, REWRITTEN)
    names = {int(own): expected.name(int(value)) for own, value in found.names.items() if own}
    return Parameters(_renamed(content, width, names), {**found.differences, **differences})


def _different_signature(fresh: bytes, content: bytes, bits: int | None) -> dict[str, str]:
    """Inputs and outputs that a signature gives another tensor than a fresh export does; the door has seen that it has
    those of the graph. Names that a tool gave them mean nothing here."""
    expected, own = ends_by_name(fresh, bits), ends_by_name(content, bits)
    wrong = {name: (own[name], place) for name, place in expected.items() if own.get(name, place) != place}
    return {
        name: f"{name} of the signature: it is number {number} where the checkpoint gives {place}"
        for name, (number, place) in wrong.items()
    }


def without_roundings(content: bytes, bits: int | None) -> Callable[[Batch], list[Array]]:
    """A file without its roundings of activations, so that all it computes is continuous; takes channels first."""
    flat, facts = single_graph(content, bits)
    inputs = flat.input_names
    kept = facts.channels_first if facts else ()
    rounded = {
        int(operator.outputs[0]): int(operator.inputs[0])
        for operator in flat.graph.operators
        if flat.operator_name(operator) == "ROUND"
    }
    flat.graph.operators = [operator for operator in flat.graph.operators if flat.operator_name(operator) != "ROUND"]
    for operator in flat.graph.operators:
        operator.inputs = np.array([rounded.get(int(index), int(index)) for index in operator.inputs], np.int32)
    flat.graph.outputs = np.array([rounded.get(int(index), int(index)) for index in flat.graph.outputs], np.int32)
    flat.model.signatureDefs = None
    session = LiteRTSession(flat.pack())

    def run(batch: Batch) -> list[Array]:
        return session.run(batch_to_channels_last(batch, inputs, kept))

    return run


def _graph(flat: FlatModel) -> Graph:
    """A file's graph; values are named by the numbers of their tensors."""
    constants, facts, titles = {}, {}, {}
    for index in range(len(flat.graph.tensors)):
        value, name = flat.constant(index), str(index)
        titles[name], facts[name] = flat.name(index), _facts(flat, index)
        data = flat.model.buffers[flat.tensor(index).buffer].data
        if value is not None:
            constants[name] = Constant(value)
        elif data is not None and len(data):  # of a type that no file of ours has
            constants[name] = Constant(np.asarray(data, np.uint8))
    for index in map(int, flat.graph.inputs):
        facts[str(index)]["shape"] = flat.shape(index)
    inputs, outputs = (tuple(str(int(i)) for i in part) for part in (flat.graph.inputs, flat.graph.outputs))
    nodes = in_order([_node(flat, operator) for operator in flat.graph.operators])
    return Graph(inputs, outputs, constants, nodes, facts, titles)


def _node(flat: FlatModel, operator: Operator) -> Node:
    """An operator; an input that is left out has the number -1 in the file."""
    inputs, outputs = (
        tuple("" if index < 0 else str(int(index)) for index in part) for part in (operator.inputs, operator.outputs)
    )
    while inputs and not inputs[-1]:
        inputs = inputs[:-1]
    return Node(flat.operator_name(operator), _settings(operator), inputs, outputs)


def _settings(operator: Operator) -> dict[str, object]:
    """The options that are not as they are by default."""
    custom = {name: value for name in _OTHER_OPTIONS if (value := _listed(getattr(operator, name, None)))}
    options = operator.builtinOptions
    if options is None:
        return custom
    usual = vars(type(options)())
    plain = {name: np.asarray(value).tolist() if value is not None else None for name, value in vars(options).items()}
    settings = {name: value for name, value in plain.items() if value != usual.get(name)}
    # A runtime does not look at options of another operator, whatever names they have in common.
    return settings | ({"options": type(options).__name__} if settings else {}) | custom


def _listed(value: Any) -> object:
    """Options that a file has besides, as they can be compared; nothing for none."""
    if value is None or isinstance(value, (int, str)):
        return value
    return np.asarray(value).tolist() if isinstance(value, np.ndarray) else str(vars(value))


def _facts(flat: FlatModel, index: int) -> dict[str, object]:
    """Type and grid of a tensor."""
    tensor = flat.tensor(index)
    facts: dict[str, object] = {"type": int(tensor.type)}
    grid = tensor.quantization
    if grid is not None and grid.scale is not None and len(grid.scale):
        facts["scale"] = np.asarray(grid.scale, np.float32)
        points = grid.zeroPoint if grid.zeroPoint is not None and len(grid.zeroPoint) else np.zeros(len(grid.scale))
        facts["zero points"] = np.asarray(points, np.int64)
        facts["axis"] = int(grid.quantizedDimension) if len(grid.scale) > 1 else 0
    return facts


def _folded(graph: Graph) -> Graph:
    """The graph with what depends on constants alone computed: filters that it de-quantises, shifts or scales."""

    def computed(node: Node, values: Sequence[Constant]) -> Constant | None:
        value, terms = values[0].value, [constant.terms() for constant in values]
        on_grids = {name for name in (*node.inputs, *node.outputs) if "scale" in graph.facts[name]}
        if node.kind in _FOLDED_KINDS and (node.settings or on_grids):  # a fused activation, or integers on grids
            return None
        if on_grids & {*node.outputs}:
            return None
        if node.kind == "DEQUANTIZE":
            return Constant(_dequantized(value, graph.facts[node.inputs[0]]))
        if node.kind == "CAST":
            return Constant(value.astype(_TYPES.get(graph.facts[node.outputs[0]]["type"], value.dtype)))
        if (
            node.kind not in _FOLDED_KINDS
            or len(values) != 2
            or not fits_in_memory([constant.value for constant in values])
        ):
            return None
        with np.errstate(all="ignore"):
            try:
                result = np.asarray(_FOLDED_KINDS[node.kind](value, values[1].value), value.dtype)
                summed = node.kind == "ADD"
                return Constant(result, terms[0] + terms[1] if summed else np.abs(result.astype(np.float64)))
            except (ValueError, TypeError):  # shapes that do not go together, or floats that are shifted
                return None

    return fold(graph, computed)


def _dequantized(value: Array, facts: Mapping[str, object]) -> Array:
    """The numbers that integers on a grid stand for, float32."""
    scale, zero_points = facts.get("scale"), facts.get("zero points")
    if not isinstance(scale, np.ndarray) or not isinstance(zero_points, np.ndarray):
        return value.astype(np.float32)
    shape = [-1 if i == facts["axis"] else 1 for i in range(value.ndim)] if len(scale) > 1 else [1] * value.ndim
    points = np.broadcast_to(zero_points, scale.shape)
    return (value.astype(np.float32) - points.reshape(shape).astype(np.float32)) * scale.reshape(shape)


def _renamed(content: bytes, bits: int | None, names: Mapping[int, str]) -> bytes:
    """A file in which the tensors of one network have the names that a fresh export gives them.

    Args:
        content: The file.
        bits: The width whose network it is; None for a fixed file.
        names: By number of the tensor.
    """
    model, _ = unpack(content)
    keys = {signature_of(bits), signature_of(bits).encode()} if bits is not None else set()
    place = next((entry.subgraphIndex for entry in model.signatureDefs or () if entry.signatureKey in keys), 0)
    for index, tensor in enumerate(model.subgraphs[place].tensors):
        tensor.name = names.get(index, f"rewritten/{index}")
    return serialise(model)
