"""A quantised weight as a file holds it, whatever the format. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["CodedWeight"]


@dataclass(frozen=True)
class CodedWeight:
    """One quantised weight of a file: ``scale * (codes >> shift) + offset``.

    Attributes:
        name: Name of the weight, e.g. ``layers.0.conv0.weight``; the codes are its ``.codes`` initializer.
        codes: uint8, as stored, in PyTorch's layout.
        shift: Right shift in bits.
        scale: float32 value.
        offset: float32 value.
        bits: Width of the shifted codes.
    """

    name: str
    codes: npt.NDArray[np.uint8]
    shift: int
    scale: float
    offset: float
    bits: int

    @property
    def layer(self) -> str:
        """Name of the layer, e.g. ``layers.0.conv0``."""
        return self.name.removesuffix(".weight")

    def shifted(self) -> npt.NDArray[np.uint8]:
        """The codes at the file's width, uint8."""
        return self.codes >> np.uint8(self.shift)

    def dequantized(self) -> npt.NDArray[np.float64]:
        """The weight in float64, the shape of ``codes``."""
        return self.shifted().astype(np.float64) * self.scale + self.offset
