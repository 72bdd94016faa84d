"""From the values that a network shows to the grid that they are rounded to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError
from tqexport.integer.grids import HIGHEST, Grid, grid_of_range

__all__ = ["ESTIMATORS", "RangeEstimator", "grid_of_values"]

RangeEstimator = Literal["min-max", "percentile", "mse"]

Values = npt.NDArray[np.float32]
Range = tuple[float, float]

_PERCENTILE = 0.01  # per cent cut off at either end
_SHRINKS = np.linspace(1.0, 0.4, 61)
_MOST_VALUES = 1 << 16  # the search for the least error looks at so many, evenly chosen


def _min_max(values: Values) -> Range:
    return float(values.min()), float(values.max())


def _percentile(values: Values) -> Range:
    low, high = np.percentile(values, (_PERCENTILE, 100 - _PERCENTILE))
    return float(low), float(high)


def _least_squares(values: Values) -> Range:
    """The shrunken range of the smallest mean squared error."""
    full = _min_max(values)
    chosen = values[:: max(1, len(values) // _MOST_VALUES)].astype(np.float64)

    def error(shrink: float) -> float:
        grid = grid_of_range(full[0] * shrink, full[1] * shrink)
        q = np.clip(np.rint(chosen / grid.scale) + grid.zero_point, 0, HIGHEST)
        return float(np.square((q - grid.zero_point) * grid.scale - chosen).mean())

    best = min(_SHRINKS, key=error)
    return full[0] * best, full[1] * best


ESTIMATORS: Mapping[RangeEstimator, Callable[[Values], Range]] = {
    "min-max": _min_max,
    "percentile": _percentile,
    "mse": _least_squares,
}


def grid_of_values(name: str, values: Values, estimator: RangeEstimator, *, symmetric: bool = False) -> Grid:
    """The grid for what a value of the network was seen to be.

    Args:
        name: The value's, for the message.
        values: float32, flat, at least one.
        estimator: ``min-max`` covers all of them; ``percentile`` all but 0.01 % at either end; ``mse`` looks for the
            range of the smallest mean squared error.
        symmetric: Put zero on the middle level.

    Raises:
        InputError: The values are NaN or infinite, or all the same.
    """
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values on these samples; check the samples and the training")
    if values.min() == values.max():
        raise InputError(f"{name} is {values.min():g} on all of these samples, so no grid can be found for it")
    low, high = ESTIMATORS[estimator](values)
    if low >= high or (low == 0 == high):
        low, high = _min_max(values)  # all but a few are the same number
    return grid_of_range(low, high, symmetric=symmetric)
