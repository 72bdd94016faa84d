"""How integers are multiplied back to 8 bits: the roundings of the runtimes, exact to the last bit.

* ``real``: the product with a float32 factor, rounded half to even. onnxruntime.
* ``web``: the same, but sums of two values are those of the floats that they stand for. onnxruntime-web, whose build
  lacks the kernel that adds levels.
* ``xnnpack``: the same as ``real`` in convolutions; sums in whole numbers with factors of 21 bits, halves up; moves to
  another grid with factors that are whole 256ths.
* ``litert``: LiteRT's own kernels: a factor of 31 bits with rounding, then a rounding shift, halves up (TFLite's
  ``MultiplyByQuantizedMultiplier``).
* ``tflm``: TFLite Micro: the same, but halves of the shift are rounded away from zero.

Orders of float32 operations were found by running the kernels; another machine's may differ where a value lies within
a few millionths of a half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tqexport.integer.grids import OFFSET, Grid

__all__ = [
    "HEADROOM",
    "ROUNDINGS",
    "FixedPoint",
    "Rounding",
    "add",
    "average",
    "layer_factor",
    "mean_factor",
    "move",
    "move_factor",
    "requantize",
    "sum_factors",
    "to_grid",
]

Rounding = Literal["real", "web", "xnnpack", "litert", "tflm"]
ROUNDINGS: tuple[Rounding, ...] = ("real", "web", "xnnpack", "litert", "tflm")

HEADROOM = 20  # bits of the terms of a sum
_MOST_LEFT = 14  # a shift further to the left leaves every grid as well

Integers = npt.NDArray[np.int64]
Levels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FixedPoint:
    """``multiplier * 2^(exponent - 31)``, as LiteRT and TFLite Micro multiply by.

    Attributes:
        multiplier: 0, or 31 bits: ``2^30`` to ``2^31 - 1``; int64, a number or an array.
        exponent: int64, the same shape.
    """

    multiplier: Any
    exponent: Any

    @staticmethod
    def nearest(factor: Any) -> FixedPoint:
        """A positive factor (TFLite's ``QuantizeMultiplier``); what vanishes at every sum is 0."""
        mantissa, exponent = np.frexp(np.asarray(factor, np.float64))
        multiplier = np.floor(mantissa * (1 << 31) + 0.5).astype(np.int64)
        overflow = multiplier == 1 << 31
        multiplier = np.where(overflow, multiplier // 2, multiplier)
        exponent = exponent.astype(np.int64) + overflow
        vanishes = exponent < -31
        return FixedPoint(np.where(vanishes, 0, multiplier), np.where(vanishes, 0, exponent))


def layer_factor(
    source_scale: npt.NDArray[np.float32] | float, weight_scale: npt.NDArray[np.float32] | float, target: Grid
) -> FixedPoint:
    """What LiteRT and TFLite Micro multiply the sums of a layer by, in the shape of ``weight_scale``."""
    real = np.float64(np.float32(source_scale)) * np.asarray(weight_scale, np.float32).astype(np.float64)
    return FixedPoint.nearest(real / np.float64(np.float32(target.scale)))


def sum_factors(first: Grid, second: Grid, target: Grid) -> tuple[FixedPoint, FixedPoint, FixedPoint]:
    """What they multiply the two terms of a sum by, which have 20 bits of headroom, and the sum of these."""
    scales = [np.float64(np.float32(grid.scale)) for grid in (first, second)]
    twice_largest = 2 * max(scales)
    back = twice_largest / ((1 << HEADROOM) * np.float64(np.float32(target.scale)))
    a, b = (FixedPoint.nearest(scale / twice_largest) for scale in scales)
    return a, b, FixedPoint.nearest(back)


def mean_factor(count: int, source: Grid, target: Grid) -> FixedPoint:
    """What they multiply the sum of ``count`` values by for its mean (TFLite's mean of integers)."""
    factor = FixedPoint.nearest(np.float64(np.float32(source.scale)) / np.float64(np.float32(target.scale)))
    shift = min(count.bit_length() - 1, 32, 31 + int(factor.exponent))
    return FixedPoint((factor.multiplier << np.int64(shift)) // count, factor.exponent - shift)


def to_grid(values: npt.NDArray[np.float32], grid: Grid) -> Levels:
    """Floats as levels of a grid: ``clip(round_half_even(x / scale) + zero_point)``, uint8, same shape."""
    return _clip(np.rint(values / np.float32(grid.scale)).astype(np.int64) + grid.zero_point, grid)


def requantize(
    sums: Integers,
    source_scale: npt.NDArray[np.float32] | float,
    weight_scale: npt.NDArray[np.float32] | float,
    target: Grid,
    rounding: Rounding,
) -> Levels:
    """Take int32 sums to a grid: ``sums * source_scale * weight_scale / target.scale``, rounded.

    Args:
        sums: int32 values in an int64 array, any shape.
        source_scale: Of what was multiplied with the weights.
        weight_scale: Of the weights; an array that broadcasts with ``sums`` where each output channel has its own.
        target: The grid of the result.
        rounding: Whose.
    """
    if rounding in ("real", "web", "xnnpack"):
        factor = np.float32(source_scale) * np.asarray(weight_scale, np.float32) / np.float32(target.scale)
        product = sums.astype(np.float32) * factor
        return _clip(np.rint(product).astype(np.int64) + target.zero_point, target)
    fixed_point = layer_factor(source_scale, weight_scale, target)
    return _clip(_multiply(sums, fixed_point, rounding) + target.zero_point, target)


def move(levels: Levels, source: Grid, target: Grid, rounding: Rounding) -> Levels:
    """A value on another grid; uint8, same shape."""
    sums = levels.astype(np.int64) - source.zero_point
    factor = move_factor(source.scale / target.scale, rounding)
    if factor is None:
        rounding = "litert" if rounding == "xnnpack" else rounding
        return requantize(sums, source.scale, 1.0, target, rounding)
    return _clip(((sums * int(factor * 256) + 128) >> 8) + target.zero_point, target)


def move_factor(ratio: float, rounding: Rounding) -> float | None:
    """What a move multiplies by in the place of ``ratio``, where it is something else: XNNPACK has whole 256ths.

    XNNPACK takes ratios from 1/256 to 128 and leaves others to LiteRT.
    """
    return float(np.rint(256 * np.float32(ratio)) / 256) if rounding == "xnnpack" and 2**-8 <= ratio <= 2**7 else None


def add(first: Levels, first_grid: Grid, second: Levels, second_grid: Grid, target: Grid, rounding: Rounding) -> Levels:
    """The sum of two values on their grids, on a third grid; uint8, the shape of both."""
    a, b = (x.astype(np.int64) - grid.zero_point for x, grid in ((first, first_grid), (second, second_grid)))
    if rounding == "real":
        return _add_in_floats(first, first_grid, second, second_grid, target)
    if rounding == "web":
        terms = [x.astype(np.float32) * np.float32(grid.scale) for x, grid in ((a, first_grid), (b, second_grid))]
        return to_grid(terms[0] + terms[1], target)
    within = all(2**-10 <= grid.scale / target.scale < 2**8 for grid in (first_grid, second_grid))
    if rounding == "xnnpack" and within:  # XNNPACK leaves other sums to LiteRT
        ratios = [np.float32(grid.scale) / np.float32(target.scale) for grid in (first_grid, second_grid)]
        shift = 20 - int(np.frexp(max(ratios))[1] - 1)
        factors = [int(np.rint(np.ldexp(np.float64(ratio), shift))) for ratio in ratios]
        half = np.int64(1) << np.int64(shift - 1)
        return _clip(((a * factors[0] + b * factors[1] + half) >> np.int64(shift)) + target.zero_point, target)
    # LiteRT and TFLite Micro do the same here.
    first_factor, second_factor, back = sum_factors(first_grid, second_grid, target)
    total = _multiply(a << HEADROOM, first_factor, "tflm") + _multiply(b << HEADROOM, second_factor, "tflm")
    return _clip(_multiply(total, back, "tflm") + target.zero_point, target)


def average(sums: Integers, count: int, source: Grid, target: Grid, rounding: Rounding) -> Levels:
    """The mean of ``count`` values from their sum, zero points taken off; uint8, the shape of ``sums``."""
    if rounding in ("real", "web"):
        factor = np.float32(source.scale) / (np.float32(target.scale) * np.float32(count))
        product = sums.astype(np.float32) * factor
        return _clip(np.rint(product).astype(np.int64) + target.zero_point, target)
    if rounding == "xnnpack":
        return _average_in_floats(sums, count, source, target)
    fixed_point = mean_factor(count, source, target)
    return _clip(_multiply(sums, fixed_point, "tflm") + target.zero_point, target)  # LiteRT as well


def _add_in_floats(first: Levels, first_grid: Grid, second: Levels, second_grid: Grid, target: Grid) -> Levels:
    """onnxruntime's order of operations, each multiplication and addition fused as on processors with FMA."""
    a, b, c = (np.float32(grid.scale) for grid in (first_grid, second_grid, target))
    ratio_a, ratio_b = a / c, b / c
    zeros = _fused(np.float32(first_grid.zero_point), ratio_a, ratio_b * np.float32(second_grid.zero_point))
    fixed = np.float32(target.zero_point) - zeros
    total = _fused(first, ratio_a, _fused(second, ratio_b, fixed))
    return _clip(np.rint(total).astype(np.int64), target)


def _fused(x: Any, factor: np.float32, term: Any) -> Any:
    """``x * factor + term`` rounded once to float32; the product of a level and a float32 is exact in float64."""
    return (np.asarray(x, np.float64) * np.float64(factor) + np.asarray(term, np.float64)).astype(np.float32)


def _average_in_floats(sums: Integers, count: int, source: Grid, target: Grid) -> Levels:
    """XNNPACK's order of operations, which works on int8 and takes the zero points off in float32."""
    whole = count * (source.zero_point - OFFSET)
    factor = np.float32(source.scale) / np.float32(target.scale) * (np.float32(1) / np.float32(count))
    fixed = np.float32(target.zero_point - OFFSET) - np.float32(whole) * factor
    total = (sums + whole).astype(np.float32) * factor + fixed
    return _clip(np.rint(total).astype(np.int64) + OFFSET, target)


def _multiply(x: Integers, factor: FixedPoint, rounding: Rounding) -> Integers:
    """A doubling high product with rounding, then a shift with rounding: halves up, or in TFLM away from zero."""
    left, right = np.clip(factor.exponent, 0, _MOST_LEFT), np.maximum(-factor.exponent, 0)
    # What is shifted left leaves every grid long before 16 bits, so it may as well be cut: 64 bits hold the product.
    product = (np.where(left > 0, np.clip(x, -65535, 65535), x) << left) * factor.multiplier
    nudge = np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    total = product + nudge
    high = np.where(total >= 0, total >> 31, -((-total) >> 31))  # C's division truncates
    half = (np.int64(1) << right) >> 1
    if rounding == "tflm":
        half = half - ((high < 0) & (right > 0))  # halves away from zero
    return np.asarray((high + half) >> right, np.int64)


def _clip(levels: Integers, grid: Grid) -> Levels:
    return np.clip(levels, grid.low, grid.high).astype(np.uint8)
