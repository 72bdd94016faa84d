"""Channels first, as PyTorch and ONNX have them, and channels last, as TFLite has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = ["LAYOUT", "batch_to_channels_last", "of_samples", "to_channels_first", "to_channels_last"]

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


def of_samples(value: Array, count: int, size: int, steps: int = 1) -> Array:
    """What belongs to the first samples of a group, one behind the other as a file of one sample at a time gives it.

    Args:
        value: Of a group, as the file gives it.
        count: How many samples are wanted.
        size: How many samples the group has.
        steps: How often all samples come one behind the other in ``value``, as they do for every step of a sequence.

    Raises:
        InputError: The value does not have so many samples and steps.
    """
    if steps == 1:
        return value if count == size else value[: len(value) // size * count]
    shape = list(value.shape)
    axis = next((axis for axis in range(value.ndim) if np.prod(shape[: axis + 1]) >= steps * size), 0)  # of the samples
    if value.size % (steps * size) or not value.size or shape[axis] % size:
        raise InputError(f"has a value of shape {value.shape}, which is not of {steps} steps of {size} samples")
    shape[axis] //= size
    apart = np.moveaxis(value.reshape(steps, size, -1), 1, 0)
    return np.concatenate([sample.reshape(shape) for sample in apart[:count]])
