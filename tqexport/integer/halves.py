"""Nine-bit weights on eight-bit hardware: a layer reads its input twice, and a few channels a third time.

At 8 bits the weights are odd integers from -255 to 255. Each is ``first + second + third`` with ``first = weight / 2``,
cut towards zero, ``second`` the rest, up to 127 in size, and ``third`` what is still missing, -1 or 1: only for weights
of -255 and 255. So a convolution with the input's channels twice, and those channels that have such a weight once more,
against ``[first, second, third]`` is exact in int8 and int32. They are read in few ranges, as devices cut ranges and
gather nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tqexport.errors import ConversionError
from tqexport.integer.model import Convolution, Window
from tqexport.integer.weights import LARGEST

__all__ = ["Halves", "halves_of", "three_columns"]

_MOST_RANGES = 4


@dataclass(frozen=True)
class Halves:
    """A wide layer's weights in int8.

    Attributes:
        weight: int8 (out, in, *kernel): input channels twice and once more, with groups as they were; for a layer
            of several groups (out, in / groups, *kernel), the last axis of the kernel with each column three times.
        extra: The ranges of input channels that are read a third time; empty for a layer of several groups.
    """

    weight: npt.NDArray[np.int8]
    extra: tuple[range, ...]


def halves_of(layer: Convolution) -> Halves:
    """The int8 weights of a wide layer.

    A layer of one group gets copies of its channels, any other copies of each column of the last spatial axis.
    """
    first, second, third = parts(layer.weight)
    if layer.groups > 1:
        columns = np.stack([first, second, third], -1).astype(np.int8)
        return Halves(columns.reshape(*columns.shape[:-2], -1), ())
    extra = _ranges(np.flatnonzero(np.moveaxis(third, 1, 0).reshape(third.shape[1], -1).any(1)).tolist())
    pieces = [first, second, *(third[:, run.start : run.stop] for run in extra)]
    return Halves(np.concatenate(pieces, 1).astype(np.int8), extra)


def _ranges(channels: list[int]) -> tuple[range, ...]:
    """A few ranges that cover some channels, with as little else as possible."""
    runs = [range(channel, channel + 1) for channel in channels]
    while len(runs) > 1:
        gaps = [after.start - before.stop for before, after in itertools.pairwise(runs)]
        closest = gaps.index(min(gaps))
        if min(gaps) > 0 and len(runs) <= _MOST_RANGES:
            break
        runs[closest : closest + 2] = [range(runs[closest].start, runs[closest + 1].stop)]
    return tuple(runs)


def parts(weight: npt.NDArray[np.int16]) -> tuple[npt.NDArray[np.int16], ...]:
    """Three int16 tensors, each within int8, whose sum is ``weight``."""
    first = np.sign(weight) * (np.abs(weight) // 2)
    second = np.clip(weight - first, -LARGEST, LARGEST)
    return first, second, weight - first - second


def three_columns(name: str, window: Window) -> Window:
    """The window over an input whose last axis has every column three times.

    Raises:
        ConversionError: It is dilated along that axis, so that no such window exists.
    """
    if window.dilation[-1] != 1:
        raise ConversionError(f"{name} is a dilated convolution of several groups, which has no exact form at 8 bits")
    before, after = window.padding[-1]
    return Window(
        (*window.kernel[:-1], 3 * window.kernel[-1]),
        (*window.stride[:-1], 3 * window.stride[-1]),
        (*window.padding[:-1], (3 * before, 3 * after)),
        window.dilation,
    )
