"""Values at the places of a grid (GridSample), as rows that are looked up and weighted.

A sample's picture is a table with a row for each place in it. Every point of the grid lies between four places, and is
the sum of their values, each times how near it is. The grid may be a constant, or what the network computes.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
from onnx import TensorProto

from tqexport.backends.tflite.onnx_writing import Place, Writer, rewritten

__all__ = ["with_grids_written_out"]

_LINEAR = (b"linear", b"bilinear")


def with_grids_written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with the bilinear samples of pictures written out, zeros or the border around these.

    Args:
        model: A network whose sizes are all known; it is not changed.
    """
    return rewritten(model, ("GridSample",), _written)


def _written(place: Place) -> Writer | None:
    shape, grid_shape = place.shape, place.shapes.get(place.node.input[1], ())
    if not grid_shape and (grid := place.constant(1)) is not None:
        grid_shape = grid.shape
    attributes = place.attributes
    padding = attributes.get("padding_mode", b"zeros")
    if len(shape) != 4 or not all(grid_shape) or attributes.get("mode", b"linear") not in _LINEAR:
        return None
    if padding not in (b"zeros", b"border"):
        return None
    samples, channels, *sizes = shape
    rows, columns = grid_shape[1:3]
    writer = Writer(place.node.name)

    def number(value: float) -> str:
        return writer.numbers(np.array(value, np.float32))

    def between(value: str, low: float, high: float) -> str:
        return writer.add("Clip", value, number(low), number(high))

    def in_picture(coordinate: str, size: int) -> str:
        """Where a coordinate from -1 to 1 lies, counted in places."""
        ends = int(attributes.get("align_corners", 0))
        moved = writer.add("Add", coordinate, number(1))
        if ends:
            value = writer.add("Mul", moved, number((size - 1) / 2))
        else:
            value = writer.add("Sub", writer.add("Mul", moved, number(size / 2)), number(0.5))
        return between(value, 0, size - 1) if padding == b"border" else value

    def sampled(picture: str, grid: str) -> str:
        table = writer.add("Transpose", writer.reshape(picture, (channels, sizes[0] * sizes[1])), perm=[1, 0])
        points = writer.reshape(grid, (rows * columns, 2))
        axes = []
        for part, size in zip(writer.split(points, [1, 1], 1), sizes[::-1], strict=True):
            where = in_picture(part, size)
            first = writer.add("Floor", where)
            share = writer.add("Sub", where, first)
            second = writer.add("Add", first, number(1))
            axes.append([(first, writer.add("Sub", number(1), share)), (second, share)])
        sums = []
        for (x, near_x), (y, near_y) in product(*axes):
            weight = writer.add("Mul", near_x, near_y)
            for coordinate, size in ((x, sizes[1]), (y, sizes[0])):  # 1 within the picture, 0 outside of it
                weight = writer.add("Mul", weight, between(writer.add("Add", coordinate, number(1)), 0, 1))
                weight = writer.add("Mul", weight, between(writer.add("Sub", number(size), coordinate), 0, 1))
            above = writer.add("Mul", between(y, 0, sizes[0] - 1), number(sizes[1]))
            index = writer.add("Add", above, between(x, 0, sizes[1] - 1))
            taken = writer.add("GatherND", table, writer.add("Cast", index, to=TensorProto.INT64))
            sums.append(writer.add("Mul", taken, weight))
        total = sums[0]
        for each in sums[1:]:
            total = writer.add("Add", total, each)
        return writer.reshape(writer.add("Transpose", total, perm=[1, 0]), (1, channels, rows, columns))

    pictures = writer.split(place.node.input[0], [1] * samples, 0)
    grids = writer.split(place.node.input[1], [1] * samples, 0)
    results = [sampled(*pair) for pair in zip(pictures, grids, strict=True)]
    whole = writer.add("Concat", *results, axis=0) if samples > 1 else results[0]
    writer.add("Identity", whole, output=place.node.output[0])
    return writer
