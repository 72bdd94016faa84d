"""Channels first, as PyTorch and ONNX have them, and channels last, as TFLite has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LAYOUT", "to_channels_first", "to_channels_last"]

LAYOUT = "channels last"

Array = npt.NDArray[Any]


def to_channels_last(x: Array, *, kept: bool = False) -> Array:
    """A value (N, C, ...) as a TFLite file has it; ``kept`` where that is the same."""
    return x if kept or x.ndim < 3 else np.ascontiguousarray(np.moveaxis(x, 1, -1))


def to_channels_first(x: Array, *, kept: bool = False) -> Array:
    """A value of a TFLite file as (N, C, ...); ``kept`` where that is the same."""
    return x if kept or x.ndim < 3 else np.moveaxis(x, -1, 1)
