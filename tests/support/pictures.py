"""The digits as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from places import DIGITS_DATA

__all__ = ["write_pictures"]


def write_pictures(
    folder: Path, count: int = 40, name: Callable[[int], str] = str, size: int = 1, mode: str = "L"
) -> Path:
    """Write the first digits of the test set, a folder per class.

    Args:
        folder: Where to.
        count: How many.
        name: From a class to the name of its folder.
        size: How many times as large as they are.
        mode: Of PIL.
    """
    with np.load(DIGITS_DATA) as data:
        inputs, labels = data["inputs"], data["labels"]
    for number, (pixels, label) in enumerate(zip(inputs[:count], labels[:count], strict=True)):
        target = folder / name(label) / f"{number:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels[0] * 255).round().astype(np.uint8))
        picture.resize((8 * size, 8 * size), Image.Resampling.NEAREST).convert(mode).save(target)
    return folder
