"""Constants that the converter must not compute with: inputs of what it is given, constants again in what it wrote.

Rows of a table that are the same for every sample, such as those of positions, it would look up itself, and write them
as a constant that has no codes; so the numbers of the rows are inputs. So are parameters that it would combine with
others beyond recognition.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from tqexport.backends.onnx.file import rebuild
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.onnx2tf import ends

__all__ = ["Given", "with_given_as_constants", "with_given_as_inputs"]

Given = Mapping[str, npt.NDArray[Any]]


def with_given_as_inputs(
    model: onnx.ModelProto, tables: Collection[str], parameters: Collection[str]
) -> tuple[onnx.ModelProto, Given]:
    """The same network with inputs in the place of constants.

    Args:
        model: It is not changed.
        tables: Names of tables; the numbers of the rows that are looked up in them become inputs.
        parameters: Names of constants that become inputs themselves.

    Returns:
        The network, and by name of the input the constant that it stands for: flat, where it has several axes, as
        onnx2tf moves those of an input.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = copy.deepcopy(model)
    graph = changed.graph
    given: dict[str, npt.NDArray[Any]] = {}
    first: list[onnx.NodeProto] = []
    initializers = [tensor for tensor in graph.initializer if tensor.name not in parameters]

    def as_input(value: npt.NDArray[Any]) -> str:
        name = f"tqexport_given_{len(given)}"
        given[name] = value
        graph.input.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        )
        return name

    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in constants:
            node.input[1] = as_input(numpy_helper.to_array(constants[node.input[1]]))
    for parameter in sorted(parameters):
        value = numpy_helper.to_array(constants[parameter])
        name = as_input(value.ravel())
        shape = numpy_helper.from_array(np.array(value.shape, np.int64), f"{name}/shape")
        initializers.append(shape)
        first.append(helper.make_node("Reshape", [name, shape.name], [parameter], f"{name}/Reshape"))
    rebuild(graph, [*first, *graph.node], initializers)
    return changed, given


def with_given_as_constants(content: bytes, given: Given) -> bytes:
    """A converted network with constants in the place of these inputs, the other way round."""
    if not given:
        return content
    flat = FlatModel(content)
    inputs = {name: index for name, index in ends(flat)[0].items() if name in given}
    for name, index in inputs.items():
        flat.set_constant(index, np.ascontiguousarray(given[name], flat.dtype(index)))
    flat.graph.inputs = np.array([index for index in flat.graph.inputs if index not in inputs.values()], np.int32)
    for signature in flat.model.signatureDefs or ():
        signature.inputs = [entry for entry in signature.inputs if entry.name.decode() not in given]
    return flat.pack()
