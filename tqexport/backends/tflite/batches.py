"""How many samples a file takes at once, which the converter must not see.

onnx2tf tells axes apart by their sizes: where a batch has as many samples as there are channels or steps, it takes one
for the other, and where steps come in front, an axis of one sample for another of 1. So it is then given a number of
samples that no size of the network is like, a prime that divides none of them, and that is replaced in what it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import ConversionError

__all__ = ["number_for_converter", "with_batch"]

_LEAST = 7  # above what axes are numbered by


def number_for_converter(models: Sequence[onnx.ModelProto], batch: int) -> int:
    """How many samples the converter is told that some networks take, which are to take ``batch``.

    One sample at a time is what it does best, as long as samples stay in front.
    """
    if batch == 1 and not any(map(_puts_steps_in_front, models)):
        return 1
    numbers = {1}
    for model in models:
        graph = onnx.shape_inference.infer_shapes(model).graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            numbers.update(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for tensor in graph.initializer:
            numbers.update(tensor.dims)
    return next(
        number
        for number in count(_LEAST, 2)
        if all(number % factor for factor in range(3, number, 2)) and all(other % number for other in numbers - {0})
    )


def _puts_steps_in_front(model: onnx.ModelProto) -> bool:
    """Whether a network exchanges samples and steps of a sequence, as recurrent layers do."""
    of_sample = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if node.op_type != "Shape" and of_sample.intersection(node.input):
            of_sample.update(node.output)
            if node.op_type == "Transpose" and [*node.attribute[0].ints] == [1, 0, 2]:
                return True
    return False


def with_batch(content: bytes, number: int, batch: int) -> bytes:
    """A file for so many samples, from one for another number that no other size in it is a multiple of.

    Args:
        content: As the converter wrote it.
        number: How many samples it takes.
        batch: How many it is to take.

    Raises:
        ConversionError: A constant is another for each sample.
    """
    if number == batch:
        return content
    flat = FlatModel(content)
    for index, (shape, places) in _shapes(flat, number).items():
        flat.set_constant(index, np.where(places, _scaled(shape, number, batch), shape))
    for index, tensor in enumerate(flat.graph.tensors):
        value, sizes = flat.constant(index), np.array(flat.shape(index), np.int32)
        if value is not None and len(axes := np.flatnonzero((sizes > 0) & (sizes % number == 0))):
            for axis in axes:
                value = _repeated(value, int(axis), number, batch)
            flat.set_constant(index, value)
        if tensor.shape is not None:
            tensor.shape = _scaled(sizes, number, batch)
        if tensor.shapeSignature is not None:
            tensor.shapeSignature = _scaled(np.asarray(tensor.shapeSignature), number, batch)
    for operator in flat.graph.operators:
        if (target := getattr(operator.builtinOptions, "newShape", None)) is not None:
            operator.builtinOptions.newShape = _scaled(np.asarray(target), number, batch)
    return flat.pack()


def _shapes(flat: FlatModel, number: int) -> dict[int, tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
    """The constants that are shapes or bounds of slices, and where in them an axis of samples is meant."""
    found: dict[int, tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]] = {}
    for operator in flat.graph.operators:
        shapes = [np.array(flat.shape(int(index))) for index in (*operator.inputs[:1], *operator.outputs)]
        for index in map(int, operator.inputs):
            value = flat.constant(index) if index >= 0 else None
            if value is None or value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
                continue
            sizes = flat.operator_name(operator) == "SPLIT_V"  # of its results, each along one axis
            of_samples = [shape % number == 0 for shape in shapes if len(shape) == len(value)]
            places = np.any([np.full(len(value), sizes), *of_samples], axis=0)
            found[index] = (value, places | found[index][1] if index in found else places)
    return found


def _scaled(values: npt.NDArray[Any], number: int, batch: int) -> npt.NDArray[Any]:
    """Whole numbers, those that count samples in another number of them."""
    return np.where(values % number == 0, values // number * batch, values).astype(values.dtype)


def _repeated(value: npt.NDArray[Any], axis: int, number: int, batch: int) -> npt.NDArray[Any]:
    """A constant that has the same for every sample along an axis, for another number of samples."""
    before, times, after = value.shape[:axis], value.shape[axis] // number, value.shape[axis + 1 :]
    apart = value.reshape(*before, times, number, *after)
    one = apart.take([0], axis + 1)
    if not np.array_equal(np.broadcast_to(one, apart.shape), apart):
        raise ConversionError("onnx2tf wrote a constant that is another for each sample; deploy the network as ONNX")
    return one.repeat(batch, axis + 1).reshape(*before, times * batch, *after)
