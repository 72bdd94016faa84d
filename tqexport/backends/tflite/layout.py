"""Channels first, as PyTorch and ONNX have them, and channels last, as TFLite has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = ["LAYOUT", "batch_to_channels_last", "to_channels_first", "to_channels_last"]

LAYOUT = "channels last"

Array = npt.NDArray[Any]


def batch_to_channels_last(batch: Batch, names: Sequence[str], kept: Collection[str]) -> Batch:
    """Samples as a TFLite file takes them, whose inputs have these ``names``; those in ``kept`` are the same."""
    return tuple(to_channels_last(x, kept=name in kept) for name, x in zip(names, batch, strict=True))


def to_channels_last(x: Array, *, kept: bool = False) -> Array:
    """A value (N, C, ...) as a TFLite file has it; ``kept`` where that is the same."""
    return x if kept or x.ndim < 3 else np.ascontiguousarray(np.moveaxis(x, 1, -1))


def to_channels_first(x: Array, *, kept: bool = False) -> Array:
    """A value of a TFLite file as (N, C, ...); ``kept`` where that is the same."""
    return x if kept or x.ndim < 3 else np.moveaxis(x, -1, 1)
