"""The forms in which a graph of ONNX is compared: as it is, with constants folded, and with BatchNorms folded as well.

Tools fold what they can before a file runs; a file that computes the same is to be recognised in whatever form it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference import ReferenceEvaluator

from tqexport.backends.graphs import FOLDED, Constant, Graph, Node, fits_in_memory, fold
from tqexport.backends.onnx.file import CODES
from tqexport.backends.onnx.integer_form import MOST_IN_FLOAT

__all__ = ["FoldedWeights", "folded_weights", "forms"]

Array = npt.NDArray[Any]

_PLAIN = {  # round nothing, or one number
    *("BitShift", "Cast", "Clip", "Concat", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"),
}
_FOLDED_KINDS = _PLAIN | {"Add", "Div", "Mul", "Sub"}
_FOLDED_TYPES = {*map(np.dtype, ("bool", "int8", "uint8", "int32", "int64", "float32", "float64"))}
_OPERATIONS = {"Mul": np.multiply, "Div": np.divide}
_CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}  # with the axis that counts output channels
_MOST_AXES = 5  # of a weight: of a Conv3d
_NORM_CONSTANTS = 4  # of a BatchNormalization: weight, bias, mean, variance


def forms(graph: Graph) -> tuple[Graph, ...]:
    """The graph in the forms of :func:`tqexport.backends.parameters.matched`."""
    folded = _with_float_biases(_without_ones(fold(graph, _computed)))
    return graph, folded, _with_norms_folded(folded)


@dataclass(frozen=True)
class FoldedWeights:
    """What a file of another structure has in the place of codes.

    Attributes:
        names: Weights that it has as the floats that their codes give.
        with_norm: Values that layers compute in it with the BatchNorm behind them, whatever they are called.
    """

    names: frozenset[str] = frozenset()
    with_norm: frozenset[str] = frozenset()


def folded_weights(fresh: Sequence[Graph], own: Sequence[Graph]) -> FoldedWeights:
    """The weights that a file of another structure has as floats.

    These are the floats of the fresh export to the last bit, or, times the gain of a BatchNorm, up to rounding.

    Args:
        fresh: A fresh export in its forms.
        own: The file likewise.
    """
    (plain, folded, normed), (_, rewritten, _) = fresh, own
    stored: dict[tuple[int, ...], list[tuple[Node, Array]]] = {}  # constants with their readers, by their sizes
    for node in rewritten.nodes:
        for name in rewritten.constants.keys() & {*node.inputs}:
            value = rewritten.constants[name].value
            if value.dtype == np.float32:
                stored.setdefault(tuple(sorted(value.shape)), []).append((node, value))
    with_norm = {id(node.source): node for node in normed.nodes}

    def readers(constant: Constant, tolerance: float) -> list[Node]:
        """Operators of the file that read a constant, which may have its axes in any order."""
        if constant.value.ndim > _MOST_AXES:
            return []
        orders = [*permutations(range(constant.value.ndim))]
        return [
            node
            for node, value in stored.get(tuple(sorted(constant.value.shape)), ())
            if any(_is_near(constant, order, value, tolerance) for order in orders)
        ]

    names, merged = set[str](), set[str]()
    for weight in (name.removesuffix(CODES) for name in plain.constants if name.endswith(CODES)):
        made = {weight + CODES}
        for node in plain.nodes:
            if not made.isdisjoint(node.inputs):
                made.update(node.outputs)
        read = [(node, name) for node in folded.nodes for name in node.inputs if name in made & folded.constants.keys()]
        whole = bool(read)
        for node, name in read:
            twin = with_norm.get(id(node.source))
            found = readers(folded.constants[name], 0.0)
            if not found and twin is not None and node.inputs[1:2] == (name,) != twin.inputs[1:2]:
                found = readers(normed.constants[twin.inputs[1]], FOLDED)
                merged.update(each.outputs[0] for each in found)
            whole = whole and bool(found)
        if whole:
            names.add(weight)
    return FoldedWeights(frozenset(names), frozenset(merged))


def _is_near(constant: Constant, order: Sequence[int], value: Array, tolerance: float) -> bool:
    """Whether a constant with its axes in an order is another, up to a share of its terms."""
    moved = constant.value.transpose(order)
    if moved.shape != value.shape:
        return False
    apart = np.abs(moved - value.astype(np.float64))
    return bool((apart <= constant.terms().transpose(order) * tolerance).all())


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


def _evaluate(node: Node, values: Sequence[Array]) -> Array:
    """The one result of an operator of a file."""
    reference: Any = ReferenceEvaluator(node.source)
    return np.asarray(reference.run(None, dict(zip(node.source.input, values, strict=True)))[0])
