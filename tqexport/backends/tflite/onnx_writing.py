"""Writing operators of ONNX in the place of one that onnx2tf does not carry over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from tqexport.backends.onnx.file import CONSTANT_PREFIX, rebuild

__all__ = ["Place", "Values", "Writer", "read_by_something", "rewritten"]

Values = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Place:
    """An operator and what is known around it.

    Attributes:
        node: The operator.
        shapes: Sizes of values by name; 0 where one is not known.
        values: Constants by name.
        producers: The operator that gives a value, by its name.
    """

    node: onnx.NodeProto
    shapes: Mapping[str, tuple[int, ...]]
    values: Values
    producers: Mapping[str, onnx.NodeProto]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its first input; empty where they are not known."""
        shape = self.shapes.get(self.node.input[0], ()) if self.node.input else ()
        return shape if all(shape) else ()

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes by name."""
        return {each.name: helper.get_attribute_value(each) for each in self.node.attribute}

    def constant(self, number: int) -> npt.NDArray[Any] | None:
        """The value of an input that is a constant; None where there is none."""
        return self.values.get(self.node.input[number]) if number < len(self.node.input) else None


def rewritten(
    model: onnx.ModelProto, operators: Sequence[str], write: Callable[[Place], Writer | None]
) -> onnx.ModelProto:
    """The same network with some operators written otherwise.

    Args:
        model: A network whose sizes are all known; it is not changed.
        operators: Kinds of operator to look at.
        write: Gives what stands in the place of one, with the same outputs; None leaves it as it is.
    """
    if not any(node.op_type in operators for node in model.graph.node):
        return model
    changed = copy.deepcopy(model)
    graph = changed.graph
    del graph.value_info[:]  # which may be of before sizes were known
    inferred = onnx.shape_inference.infer_shapes(changed).graph
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        writer = write(Place(node, shapes, values, producers)) if node.op_type in operators else None
        nodes += [node] if writer is None else writer.nodes
        values.update({} if writer is None else writer.constants)
    nodes = read_by_something(nodes, [value.name for value in graph.output])
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    before = {tensor.name for tensor in graph.initializer}
    initializers += [numpy_helper.from_array(values[name], name) for name in values if name in used - before]
    rebuild(graph, nodes, initializers)
    return changed


def read_by_something(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes whose results reach an output: what put weights in another order is read no more."""
    used, kept = set(outputs), []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    return kept[::-1]


@dataclass
class Writer:
    """Nodes that are written one after the other, and their constants."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Write an operator of one result; returns its name."""
        name = f"{self.prefix}/{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output or name], name, **attributes))
        return output or name

    def add_all(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Write an operator of several results; returns their names."""
        name = f"{self.prefix}/{operator}_{len(self.nodes)}"
        names = [f"{name}/{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name, **attributes))
        return names

    def constant(self, value: Sequence[int]) -> str:
        """A constant of an operator."""
        name = f"{CONSTANT_PREFIX}{self.prefix}/{'_'.join(map(str, value))}"
        self.constants[name] = np.array(value, np.int64)
        return name

    def numbers(self, values: npt.NDArray[np.float32]) -> str:
        """A constant that is computed with."""
        name = f"{CONSTANT_PREFIX}{self.prefix}/numbers_{len(self.constants)}"
        self.constants[name] = values
        return name

    def parameter(self, name: str, values: npt.NDArray[Any]) -> str:
        """A parameter of the network in another shape: it differs from width to width."""
        self.constants[name] = values
        return name

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        return self.add("Reshape", value, self.constant(shape))

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Take a value apart along an axis."""
        if len(sizes) == 1:
            return [value]
        return self.add_all("Split", value, self.constant(sizes), outputs=len(sizes), axis=axis)
