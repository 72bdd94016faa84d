"""Samples in groups of as many as a file takes at once, and what comes of the groups put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tqexport.errors import InputError

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch

__all__ = ["in_groups", "of_first_samples", "put_together"]


def in_groups(batch: Batch, size: int) -> Iterator[tuple[Batch, int]]:
    """Samples in groups of one size; the last one is filled up with its last sample.

    Yields:
        A group, and how many of its samples are those of the batch.
    """
    samples = len(batch[0])
    for start in range(0, samples, size):
        count = min(size, samples - start)
        numbers = np.minimum(np.arange(start, start + size), samples - 1)
        yield batch if samples == size else tuple(values[numbers] for values in batch), count


def of_first_samples(value: Array, count: int, size: int, steps: int = 1) -> Array:
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


def put_together(parts: Sequence[Array], counts: Sequence[int], size: int | None, steps: int = 1) -> Array:
    """A value of all samples from those of groups.

    Args:
        parts: The value of each group, as the file gives it.
        counts: How many samples are wanted of each.
        size: How many samples a group has; None where it has those that are wanted.
        steps: As in :func:`of_first_samples`.

    Raises:
        InputError: The value does not have so many samples and steps.
    """
    if size is not None:
        parts = [of_first_samples(part, count, size, steps) for part, count in zip(parts, counts, strict=True)]
    return np.concatenate(parts)
