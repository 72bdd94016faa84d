"""Rows of a table that are the same for every sample, such as those of positions.

onnx2tf would look them up itself, and write the rows as a constant that has no codes. So it gets their numbers as
further inputs, and in what it wrote these are constants.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.onnx2tf import ends

__all__ = ["Numbers", "with_numbers_as_constants", "with_numbers_as_inputs"]

Numbers = Mapping[str, npt.NDArray[Any]]


def with_numbers_as_inputs(model: onnx.ModelProto, tables: Collection[str]) -> tuple[onnx.ModelProto, Numbers]:
    """The same network with an input for each constant that says which rows are looked up.

    Args:
        model: It is not changed.
        tables: Names of the tables to look at.

    Returns:
        The network, and by name of the input the constant that it stands for.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = copy.deepcopy(model)
    numbers: dict[str, npt.NDArray[Any]] = {}
    for node in changed.graph.node:
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in constants:
            tensor, name = constants[node.input[1]], f"tqexport_rows_{len(numbers)}"
            numbers[name] = numpy_helper.to_array(tensor)
            changed.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
            node.input[1] = name
    return changed, numbers


def with_numbers_as_constants(content: bytes, numbers: Numbers) -> bytes:
    """A converted network with constants in the place of inputs, the other way round."""
    if not numbers:
        return content
    flat = FlatModel(content)
    inputs = {name: index for name, index in ends(flat)[0].items() if name in numbers}
    for name, index in inputs.items():
        flat.set_constant(index, np.ascontiguousarray(numbers[name], flat.dtype(index)))
    flat.graph.inputs = np.array([index for index in flat.graph.inputs if index not in inputs.values()], np.int32)
    for signature in flat.model.signatureDefs or ():
        signature.inputs = [entry for entry in signature.inputs if entry.name.decode() not in numbers]
    return flat.pack()
