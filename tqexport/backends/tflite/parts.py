"""Parameters that a network takes apart, as attention does whose queries, keys and values come from several tensors.

A filter in TFLite is a constant of its own, so the parts are parameters of their own there: ``weight[0:8]`` has the
rows 0 to 7 of ``weight``. Together they have every code once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import numpy_helper

from tqexport.backends.coded_weight import CodedWeight, name_of_rows
from tqexport.backends.onnx.file import rebuild

__all__ = ["with_parts"]


def with_parts(model: onnx.ModelProto, weights: Sequence[CodedWeight]) -> tuple[onnx.ModelProto, Sequence[CodedWeight]]:
    """The same network with parameters of their own in the place of parts that it splits off along the first axis.

    Args:
        model: With float32 weights by the names of ``weights``; it is not changed.
        weights: The quantised ones.

    Returns:
        The network, and its quantised weights. A parameter that is read otherwise, too, is left as it is.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {
        node.input[0]: [] for node in model.graph.node if node.op_type == "Split" and node.input[0] in tensors
    }
    for node in model.graph.node:
        for name in readers.keys() & node.input:
            readers[name].append(node)
    rows: dict[str, list[tuple[int, int]]] = {}
    for name, nodes in readers.items():
        ends, *others = [_ends(node, name, tensors) for node in nodes]
        if ends and all(own == ends for own in others):
            rows[name] = [*pairwise([0, *ends])]
    if not rows:
        return model, weights
    changed = copy.deepcopy(model)
    graph, kept, parts = changed.graph, [], dict[str, str]()
    for node in graph.node:
        if node.op_type == "Split" and node.input[0] in rows:
            own = node.input[0]
            parts.update(zip(node.output, (name_of_rows(own, *ends) for ends in rows[own]), strict=True))
        else:
            node.input[:] = [parts.get(value, value) for value in node.input]
            kept.append(node)
    initializers = [tensor for name, tensor in tensors.items() if name not in rows]
    for name, every in rows.items():
        values = numpy_helper.to_array(tensors[name])
        initializers += [numpy_helper.from_array(values[slice(*ends)], name_of_rows(name, *ends)) for ends in every]
    rebuild(graph, kept, initializers)
    in_parts: list[CodedWeight] = []
    for weight in weights:
        in_parts += [weight.rows(*ends) for ends in rows[weight.name]] if weight.name in rows else [weight]
    return changed, in_parts


def _ends(node: onnx.NodeProto, name: str, tensors: Mapping[str, onnx.TensorProto]) -> list[int]:
    """Where each part of a parameter ends whose rows an operator takes apart; empty for any other operator."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type != "Split" or node.input[0] != name or attributes.get("axis", 0) != 0:
        return []
    if len(node.input) == 1:
        count = tensors[name].dims[0]
        size = -(-count // len(node.output))
        return [min(number * size, count) for number in range(1, len(node.output) + 1)]
    sizes = tensors.get(node.input[1])
    return [] if sizes is None else np.cumsum(numpy_helper.to_array(sizes)).tolist()
