"""Convolutions and maxima over windows in numpy, over one spatial axis or two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tqexport.integer.model import Window

__all__ = ["convolve", "maximum"]


def convolve(
    x: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], window: Window, groups: int
) -> npt.NDArray[np.float64]:
    """PyTorch's convolution without a bias; exact where all partial sums are whole and below 2^53.

    Args:
        x: (N, in, *space).
        weight: (out, in / groups, *kernel).
        window: How the kernel moves; the padding is zeros.
        groups: As in PyTorch.

    Returns:
        (N, out, *space).
    """
    views = _windows(x, window, 0.0)  # (N, in, *space, *kernel)
    axes = views.ndim - window_rank(window)
    count, space = views.shape[0], views.shape[2:axes]
    per_group, out = weight.shape[1], weight.shape[0] // groups
    columns = np.moveaxis(
        views.reshape(count, groups, per_group, *views.shape[2:]),
        (1, *range(3, 3 + len(space))),
        range(0, 1 + len(space)),
    )
    # (groups, *space, N, in / groups, *kernel)
    flat = columns.reshape(groups, -1, per_group * int(np.prod(window.kernel)))
    product = flat @ weight.reshape(groups, out, -1).transpose(0, 2, 1)
    placed = product.reshape(groups, *space, count, out)
    rank = placed.ndim
    return placed.transpose(rank - 2, 0, rank - 1, *range(1, rank - 2)).reshape(count, groups * out, *space)


def maximum(x: npt.NDArray[np.uint8], window: Window) -> npt.NDArray[np.uint8]:
    """The greatest value in each window; (N, C, *space), same type."""
    views = _windows(x, window, 0)  # 0 is the least level, and every window holds a real one
    return np.asarray(views.max(tuple(range(views.ndim - window_rank(window), views.ndim))), np.uint8)


def window_rank(window: Window) -> int:
    """The number of spatial axes."""
    return len(window.kernel)


def _windows(x: npt.NDArray[Any], window: Window, fill: float) -> npt.NDArray[Any]:
    """A view (N, C, *space, *kernel) of the extended input."""
    rank = window_rank(window)
    space = tuple(range(2, 2 + rank))
    padded = np.pad(x, ((0, 0), (0, 0), *window.padding), constant_values=fill)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilation, strict=True))
    views = np.lib.stride_tricks.sliding_window_view(padded, reach, space)
    steps = tuple(slice(None, None, s) for s in window.stride)
    inside = tuple(slice(None, None, d) for d in window.dilation)
    return views[(slice(None), slice(None), *steps, *inside)]
