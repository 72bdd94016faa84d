"""Parameters that a network takes apart, as attention does whose queries, keys and values come from several tensors.

A filter in TFLite is a constant of its own, so the parts are parameters of their own there: ``weight[0:8]`` has the
rows 0 to 7 of ``weight``. Together they have every code once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.coded_weight import CodedWeight, name_of_rows

__all__ = ["with_parts"]

Array = npt.NDArray[Any]


def with_parts(model: onnx.ModelProto, weights: Sequence[CodedWeight]) -> tuple[onnx.ModelProto, Sequence[CodedWeight]]:
    """The same network with parameters of their own in the place of parts that it splits off along the first axis.

    Args:
        model: With float32 weights by the names of ``weights``; it is not changed.
        weights: The quantised ones.

    Returns:
        The network, and its quantised weights. A parameter that is read otherwise, too, is left as it is.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    changed = copy.deepcopy(model)
    rows: dict[str, list[tuple[int, int]]] = {}
    parts: dict[str, str] = {}
    for name in constants:
        ends = [_ends(node, name, constants) for node in readers.get(name, [])]
        if not ends or not ends[0] or any(own != ends[0] for own in ends):
            continue
        rows[name] = [*zip([0, *ends[0][:-1]], ends[0], strict=True)]
        names = [name_of_rows(name, *own) for own in rows[name]]
        for node in readers[name]:
            parts.update(zip(node.output, names, strict=True))
            changed.graph.node.remove(node)
        changed.graph.initializer.remove(next(tensor for tensor in changed.graph.initializer if tensor.name == name))
        changed.graph.initializer.extend(
            numpy_helper.from_array(constants[name][start:end], part)
            for part, (start, end) in zip(names, rows[name], strict=True)
        )
    for node in changed.graph.node:
        node.input[:] = [parts.get(value, value) for value in node.input]
    in_parts = [
        [weight.rows(*own) for own in rows[weight.name]] if weight.name in rows else [weight] for weight in weights
    ]
    return changed, [*chain.from_iterable(in_parts)]


def _ends(node: onnx.NodeProto, name: str, constants: Mapping[str, Array]) -> list[int]:
    """Where each part of a parameter ends whose rows an operator takes apart; empty for any other operator."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type != "Split" or node.input[0] != name or attributes.get("axis", 0) != 0:
        return []
    if len(node.input) == 1:
        size = -(-len(constants[name]) // len(node.output))
        return [min(number * size, len(constants[name])) for number in range(1, len(node.output) + 1)]
    sizes = constants.get(node.input[1])
    return [] if sizes is None else np.cumsum(sizes).tolist()
