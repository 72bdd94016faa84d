"""Several codes in a byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["PACKED_WIDTHS", "packed", "unpacked"]

PACKED_WIDTHS = (1, 2, 4)  # widths of which a whole number of codes fills a byte


def packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes (rows, n) below ``2^bits`` as (rows, ceil(n * bits / 8)), the first code of a byte in its lowest bits."""
    per_byte = 8 // bits
    filled = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_byte))).reshape(len(codes), -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.asarray(np.bitwise_or.reduce(filled << shifts, -1), np.uint8)


def unpacked(stored: npt.NDArray[np.uint8], bits: int, length: int) -> npt.NDArray[np.uint8]:
    """The inverse of :func:`packed`: codes (rows, length)."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    codes = (stored[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(len(stored), -1)[:, :length], np.uint8)
