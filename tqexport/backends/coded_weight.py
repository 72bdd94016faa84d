"""A quantised weight as a file holds it, whatever the format. Needs numpy alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CodedWeight", "joined", "name_of_rows"]

Array = npt.NDArray[Any]

_ROWS = re.compile(r"(.+)\[(\d+):(\d+)\]")


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

    def rows(self, start: int, end: int) -> CodedWeight:
        """Rows of the weight as a weight of its own."""
        return replace(self, name=name_of_rows(self.name, start, end), codes=self.codes[start:end])


def name_of_rows(name: str, start: int, end: int) -> str:
    """What rows of a parameter are called that a file has by themselves."""
    return f"{name}[{start}:{end}]"


def joined(codes: Mapping[str, list[Array]]) -> dict[str, list[Array]]:
    """What a file stores of each weight, where it stores parts as if it stored the whole.

    Args:
        codes: By name of the weight or its part, at each place where it stands, in PyTorch's axis order. Parts that do
            not go together are left as they are.
    """
    parts: dict[str, dict[int, str]] = {}
    for name in codes:
        if (match := _ROWS.fullmatch(name)) and match[1] not in codes:
            parts.setdefault(match[1], {})[int(match[2])] = name
    result = dict(codes)
    for whole, by_start in parts.items():
        names = [by_start[start] for start in sorted(by_start)]
        kinds = {tuple((place.shape[1:], place.dtype) for place in codes[name]) for name in names}
        if len(kinds) == 1:
            result[whole] = [np.concatenate(places) for places in zip(*map(result.pop, names), strict=True)]
    return result
