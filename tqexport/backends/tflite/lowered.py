"""Operators that onnx2tf gets wrong, or has not, written as ones that it carries over.

Each is written out on axes and sizes that are known here, so that nothing is left to be guessed; what it computes is
the operator's definition in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from tqexport.backends.tflite.onnx_writing import Place, Writer, rewritten

__all__ = ["lowered"]

_MOST_TERMS = 128  # of a sum that is written out
_BROADCAST = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul"),
    *("Or", "Pow", "Sub", "Where", "Xor"),
)
_OF_CONSTANTS = ("Concat", "MatMul", "Unsqueeze", *_BROADCAST)  # whose first input may be one, or of no known shape


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with operators written out that onnx2tf does not carry over.

    Args:
        model: A network with float32 weights, whose sizes are all known; it is not changed.
    """
    return rewritten(model, tuple(_WAYS), _written)


def _written(place: Place) -> Writer | None:
    kind = place.node.op_type
    return _WAYS[kind](place) if place.shape or kind in _OF_CONSTANTS else None


def _circular_pad(place: Place) -> Writer | None:
    """Circular padding: the ends of each axis beside it."""
    pads = place.constant(1)
    if place.attributes.get("mode") != b"wrap" or pads is None:
        return None
    axes = place.constant(3)
    rank = len(place.shape)
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    width = {axis: (int(pads[i]), int(pads[i + len(pads) // 2])) for i, axis in enumerate(chosen)}
    needed = {axis: ends for axis, ends in width.items() if any(ends)}
    if not needed or any(not 0 <= end <= place.shape[axis] for axis, ends in needed.items() for end in ends):
        return None
    writer, value = Writer(place.node.name), place.node.input[0]
    for axis, (before, after) in needed.items():
        size = place.shape[axis]
        parts = [_slice(writer, value, size - before, size, axis)] if before else []
        parts += [value, *([_slice(writer, value, 0, after, axis)] if after else [])]
        value = writer.add("Concat", *parts, axis=axis)
    return _ended(writer, value, place)


def _zeros_counted(place: Place) -> Writer | None:
    """A mean that counts the zeros around its value: the zeros first."""
    attributes = place.attributes
    pads = attributes.get("pads", [])
    if not attributes.get("count_include_pad") or not any(pads) or attributes.get("ceil_mode"):
        return None
    writer, spatial = Writer(place.node.name), len(place.shape) - 2
    around = [0, 0, *pads[:spatial], 0, 0, *pads[spatial:]]
    padded = writer.add("Pad", place.node.input[0], writer.constant(around))
    sizes = {name: attributes[name] for name in ("dilations", "kernel_shape", "strides") if name in attributes}
    return _ended(writer, writer.add("AveragePool", padded, **sizes), place)


def _backwards(place: Place) -> Writer | None:
    """A slice that goes backwards: the elements by their indices."""
    starts, ends, axes, steps = (place.constant(number) for number in range(1, 5))
    if starts is None or ends is None or steps is None or (steps > 0).all():
        return None
    rank = len(place.shape)
    chosen = range(len(starts)) if axes is None else axes
    writer, value = Writer(place.node.name), place.node.input[0]
    for start, end, axis, step in zip(starts, ends, chosen, steps, strict=True):
        size = place.shape[int(axis) % rank]
        # In ONNX an end below -size is in front of the first element, which numpy calls None.
        last = None if step < 0 and end < -size else int(end)
        indices = np.arange(size)[slice(int(start), last, int(step))]
        value = writer.add("Gather", value, writer.constant(indices.tolist()), axis=int(axis) % rank)
    return _ended(writer, value, place)


def _resized(place: Place) -> Writer | None:
    """Interpolation as a sum of elements that are taken by their indices, one axis after the other."""
    attributes, shape = place.attributes, place.shapes.get(place.node.output[0], ())
    mode = attributes.get("mode", b"nearest")
    between_corners = attributes.get("coordinate_transformation_mode") == b"align_corners"
    uneven = mode == b"nearest" and any(after % before for before, after in zip(place.shape, shape, strict=False))
    if len(shape) != len(place.shape) or not all(shape) or not (between_corners or uneven or mode == b"cubic"):
        return None
    if "axes" in attributes or attributes.get("antialias"):
        return None
    writer, value = Writer(place.node.name), place.node.input[0]
    for axis, (before, after) in enumerate(zip(place.shape, shape, strict=True)):
        if before == after:
            continue
        shares = _shares(before, after, attributes)
        taps = int((shares != 0).sum(1).max())
        order = np.argsort(-np.abs(shares), axis=1, kind="stable")[:, :taps]
        terms = []
        for tap in range(taps):
            taken = writer.add("Gather", value, writer.constant(order[:, tap].tolist()), axis=axis)
            factors = np.take_along_axis(shares, order[:, tap : tap + 1], 1).ravel()
            terms.append(taken if (factors == 1).all() else _scaled(writer, taken, factors, axis, len(shape)))
        value = terms[0]
        for term in terms[1:]:
            value = writer.add("Add", value, term)
    return _ended(writer, value, place)


def _shares(before: int, after: int, attributes: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """How much each element of an axis has of each one before, float32 (after, before): a resized identity."""
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("sizes", TensorProto.INT64, None),
    ]
    graph = helper.make_graph([node], "", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    evaluator = ReferenceEvaluator(helper.make_model(graph))
    fed = {"x": np.eye(before, dtype=np.float32), "sizes": np.array([before, after], np.int64)}
    (resized,) = evaluator.run(None, fed)
    return np.asarray(resized, np.float32).T


def _running_sum(place: Place) -> Writer | None:
    """A cumulative sum, element by element."""
    axis_value, attributes = place.constant(1), place.attributes
    if axis_value is None or attributes.get("exclusive") or attributes.get("reverse"):
        return None
    axis = int(axis_value.ravel()[0]) % len(place.shape)
    if not 1 < place.shape[axis] <= _MOST_TERMS:
        return None
    writer = Writer(place.node.name)
    sums: list[str] = []
    for part in writer.split(place.node.input[0], [1] * place.shape[axis], axis):
        sums.append(writer.add("Add", sums[-1], part) if sums else part)
    return _ended(writer, writer.add("Concat", *sums, axis=axis), place)


def _layer_norm(place: Place) -> Writer | None:
    """A LayerNorm over several axes, whose mean is taken over one axis after the other, the last one first."""
    attributes, shape = place.attributes, place.shape
    first = int(attributes.get("axis", -1)) % max(1, len(shape))
    if len(shape) - first < 2 or first == 0 or len(place.node.output) > 1:
        return None
    writer = Writer(place.node.name)

    def mean(value: str) -> str:
        for axis in range(len(shape) - 1, first - 1, -1):
            value = writer.add("ReduceMean", value, writer.constant([axis]), keepdims=1)
        return value

    centred = writer.add("Sub", place.node.input[0], mean(place.node.input[0]))
    variance = mean(writer.add("Mul", centred, centred))
    epsilon = writer.numbers(np.array([attributes.get("epsilon", 1e-5)], np.float32))
    value = writer.add("Div", centred, writer.add("Sqrt", writer.add("Add", variance, epsilon)))
    for operator, name in zip(("Mul", "Add"), place.node.input[1:], strict=False):
        value = writer.add(operator, value, _with_axes(writer, place, name, first) or name)
    return _ended(writer, value, place)


def _broadcast(place: Place) -> Writer | None:
    """Arithmetic with a constant that has several axes, but fewer than the other value: it gets as many."""
    ranks = [len(place.shapes.get(name, ())) or np.ndim(place.values.get(name, ())) for name in place.node.input]
    writer, rank = Writer(place.node.name), max(ranks)
    inner = place.shapes.get(place.node.output[0], ())[1:-1]
    fewest = 1 if 1 in inner else 2  # onnx2tf would rather have a row on another axis than broadcast one of 1
    names = [
        (_with_axes(writer, place, name, rank - own) if fewest <= own < rank else None) or name
        for name, own in zip(place.node.input, ranks, strict=True)
    ]
    return _ended(writer, writer.add(place.node.op_type, *names), place) if writer.constants else None


def _repeated(place: Place, name: str) -> npt.NDArray[Any] | None:
    """A constant, or one sample of what repeats a constant for each; None for any other value."""
    producer, shape = place.producers.get(name), place.shapes.get(name, ())
    if producer is None:
        return place.values.get(name)
    values = place.values.get(producer.input[0]) if producer.op_type == "Expand" else None
    if values is None or (values.ndim == len(shape) and len(values) > 1):
        return None
    return np.broadcast_to(values, (1, *shape[1:]))


def _joined(place: Place) -> Writer | None:
    """A concatenation with constants: zeros beside the values, and the constants added in their places."""
    names, shape = place.node.input, place.shapes.get(place.node.output[0], ())
    found = {name: _repeated(place, name) for name in names}
    constants = {name: values for name, values in found.items() if values is not None}
    if len(constants) in (0, len({*names})) or len(shape) < 3 or not all(shape):
        return None
    if any(values.dtype != np.float32 for values in constants.values()):
        return None
    writer, rank, axis = Writer(place.node.name), len(shape), int(place.attributes["axis"]) % len(shape)
    if axis == 0:
        return None
    samples = max(map(len, constants.values()))  # 1 where constants are the same for each sample
    parts_of_it = [constants.get(name, np.zeros((1, *place.shapes.get(name, ())[1:]), np.float32)) for name in names]
    table = [np.broadcast_to(part, (samples, *part.shape[1:])) for part in parts_of_it]
    ends = np.cumsum([values.shape[axis] for values in table]).tolist()
    last = max(number for number, name in enumerate(names) if name not in constants)
    parts, filled = [], 0
    for number, (name, end) in enumerate(zip(names, ends, strict=True)):
        if name not in constants:
            pads = [0] * 2 * rank
            pads[axis] = end - table[number].shape[axis] - filled
            pads[axis + rank] = ends[-1] - end if number == last else 0
            parts.append(writer.add("Pad", name, writer.constant(pads)) if any(pads) else name)
            filled = end
    value = parts[0] if len(parts) == 1 else writer.add("Concat", *parts, axis=axis)
    constant = writer.parameter(f"{place.node.output[0]}/constants", np.concatenate(table, axis))
    return _ended(writer, writer.add("Add", value, constant), place)


def _from_the_left(place: Place) -> Writer | None:
    """A matrix of the network times a value, as the value times the matrix, which is how a linear layer has it."""
    matrix, value = place.node.input
    shape = place.shapes.get(value, ())
    if np.ndim(place.values.get(matrix, 0)) != 2 or value in place.values or len(shape) < 2:
        return None
    writer = Writer(place.node.name)
    turn = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    turned = (writer.add("Transpose", name, perm=perm) for name, perm in ((value, turn), (matrix, [1, 0])))
    return _ended(writer, writer.add("Transpose", writer.add("MatMul", *turned), perm=turn), place)


def _norm(place: Place) -> Writer | None:
    """The root of the sum of squares over axes."""
    axes = place.constant(1)
    if axes is None or not place.shape:
        return None
    writer, value = Writer(place.node.name), place.node.input[0]
    value = writer.add("Mul", value, value)
    for axis in sorted((int(axis) % len(place.shape) for axis in axes), reverse=True):
        value = writer.add("ReduceSum", value, writer.constant([axis]), keepdims=place.attributes.get("keepdims", 1))
    return _ended(writer, writer.add("Sqrt", value), place)


def _with_axes(writer: Writer, place: Place, name: str, count: int) -> str | None:
    """A constant with so many axes of one element in front; None where it is not one."""
    values = place.values.get(name)
    if values is None:
        return None
    return writer.parameter(f"{name}/{count}_axes", values.reshape([1] * count + [*values.shape]))


def _largest(place: Place) -> Writer | None:
    """The k largest of an axis: of a matrix, whose rows have that axis."""
    count, shape, axis = place.constant(1), place.shape, int(place.attributes.get("axis", -1))
    if count is None or not shape:
        return None
    writer, rank = Writer(place.node.name), len(shape)
    order = [each for each in range(rank) if each != axis % rank] + [axis % rank]
    value = place.node.input[0]
    if order != sorted(order):
        value = writer.add("Transpose", value, perm=order)
    turned = [shape[each] for each in order]
    value = writer.reshape(value, (prod(turned[:-1]), turned[-1]))
    options = {name: place.attributes.get(name, 1) for name in ("largest", "sorted")}
    found = writer.add_all("TopK", value, writer.constant(count.tolist()), outputs=2, axis=1, **options)
    for each, output in zip(found, place.node.output, strict=False):
        end = writer.reshape(each, (*turned[:-1], *count.tolist()))
        if order != sorted(order):
            end = writer.add("Transpose", end, perm=np.argsort(order).tolist())
        writer.add("Identity", end, output=output)
    return writer


def _unsqueezed(place: Place) -> Writer | None:
    """Further axes of one element, as a reshape."""
    shape = place.shapes.get(place.node.output[0], ())
    if not shape or not all(shape):
        return None
    writer = Writer(place.node.name)
    return _ended(writer, writer.reshape(place.node.input[0], shape), place)


def _blocks_turned(place: Place) -> Writer | None:
    """Blocks of a picture as channels, in two turns: onnx2tf has one operator for both, and its order is another."""
    if place.attributes.get("perm") != [0, 1, 3, 5, 2, 4]:
        return None
    writer = Writer(place.node.name)
    value = writer.add("Transpose", place.node.input[0], perm=[0, 1, 3, 2, 4, 5])
    return _ended(writer, writer.add("Transpose", value, perm=[0, 1, 2, 5, 3, 4]), place)


def _joined_blocks(place: Place) -> Writer | None:
    """Columns put back as blocks of a picture that lie side by side (``fold``): rows of blocks, turned."""
    attributes, shape = place.attributes, place.shapes.get(place.node.output[0], ())
    sizes, block = place.constant(1), place.constant(2)
    if sizes is None or block is None or len(sizes) != 2 or len(shape) != 4 or not all(shape):
        return None
    strides, apart = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    if any(attributes.get("pads", [])) or [*strides] != block.tolist() or [*apart] != [1, 1]:
        return None
    (high, wide), (rows, columns) = block.tolist(), (sizes // block).tolist()
    writer, (samples, channels, *_) = Writer(place.node.name), shape
    value = writer.reshape(place.node.input[0], [samples * channels, high, wide, rows, columns])
    value = writer.add("Transpose", value, perm=[0, 3, 1, 4, 2])
    value = writer.reshape(value, [samples, channels, rows * high, columns * wide])
    left = [int(size) - own for size, own in zip(sizes, (rows * high, columns * wide), strict=True)]
    if any(left):  # what no block reaches
        value = writer.add("Pad", value, writer.constant([0, 0, 0, 0, 0, 0, *left]))
    return _ended(writer, value, place)


def _transformed(place: Place) -> Writer | None:
    """A Fourier transform of one axis as a product with the matrix of its sines and cosines."""
    shape, attributes, axis = place.shape, place.attributes, place.constant(2)
    if axis is None or place.constant(1) is not None:
        return None
    turned = int(axis) % len(shape)
    inverse = bool(attributes.get("inverse", 0))
    size, parts = shape[turned], shape[-1]  # parts: real ones alone, or with imaginary ones
    frequencies = size // 2 + 1 if attributes.get("onesided", 0) else size
    angles = (1 if inverse else -1) * 2 * np.pi / size * (np.outer(np.arange(size), np.arange(frequencies)) % size)
    cosines, sines = np.cos(angles), np.sin(angles)
    matrix = np.stack([np.stack([cosines, sines], -1), np.stack([-sines, cosines], -1)][:parts], 1)
    matrix = matrix.reshape(size * parts, frequencies * 2) / (size if inverse else 1)

    writer, value = Writer(place.node.name), place.node.input[0]
    last = [number for number in range(len(shape)) if number != turned]
    order = [*last[:-1], turned, last[-1]]
    others = [shape[number] for number in last[:-1]]
    value = writer.reshape(writer.add("Transpose", value, perm=order), [*others, size * parts])
    value = writer.add("MatMul", value, writer.numbers(matrix.astype(np.float32)))
    value = writer.reshape(value, [*others, frequencies, 2])
    return _ended(writer, writer.add("Transpose", value, perm=np.argsort(order).tolist()), place)


def _slice(writer: Writer, value: str, start: int, end: int, axis: int) -> str:
    return writer.add("Slice", value, *(writer.constant([number]) for number in (start, end, axis)))


def _scaled(writer: Writer, value: str, factors: npt.NDArray[np.float32], axis: int, rank: int) -> str:
    """A value times a number for each place on an axis."""
    shape = [len(factors) if each == axis else 1 for each in range(rank)]
    return writer.add("Mul", value, writer.numbers(factors.reshape(shape)))


def _ended(writer: Writer, value: str, place: Place) -> Writer:
    """The result under the name that the operator's had."""
    if writer.nodes and writer.nodes[-1].output[0] == value:
        writer.nodes[-1].output[0] = place.node.output[0]
    else:
        writer.add("Identity", value, output=place.node.output[0])
    return writer


_WAYS: Mapping[str, Callable[[Place], Writer | None]] = {
    **dict.fromkeys(_BROADCAST, _broadcast),
    "AveragePool": _zeros_counted,
    "Col2Im": _joined_blocks,
    "Concat": _joined,
    "CumSum": _running_sum,
    "DFT": _transformed,
    "LayerNormalization": _layer_norm,
    "MatMul": _from_the_left,
    "Pad": _circular_pad,
    "ReduceL2": _norm,
    "Resize": _resized,
    "Slice": _backwards,
    "TopK": _largest,
    "Transpose": _blocks_turned,
    "Unsqueeze": _unsqueezed,
}
