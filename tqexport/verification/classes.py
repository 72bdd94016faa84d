"""Classes that networks put samples into: which, whether two agree, and what a share of them is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["agreement", "classes_of", "same_classes", "wilson_interval"]

Array = npt.NDArray[Any]


def classes_of(outputs: Array) -> Array:
    """The class of each sample: the largest output, or the output itself where it is a whole number; (N, ...)."""
    whole = not np.issubdtype(outputs.dtype, np.floating)
    return outputs if whole or outputs.ndim < 2 else np.asarray(outputs.argmax(1))


def agreement(outputs: Sequence[Array], others: Sequence[Array]) -> Array:
    """For each sample whether the classes of all outputs are the same, bool (N,)."""
    return same_classes([*map(classes_of, outputs)], [*map(classes_of, others)])


def same_classes(classes: Sequence[Array], others: Sequence[Array]) -> Array:
    """For each sample whether it has the same classes (N, ...) by every output, bool (N,)."""
    same = [(one == other).reshape(len(one), -1).all(1) for one, other in zip(classes, others, strict=True)]
    return np.asarray(np.all(same, axis=0))


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """95 % confidence interval of a share of ``samples`` (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927, 209-212).

    Example:
        >>> low, high = wilson_interval(0.9, 100)
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
    """
    z = 1.959964
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)
