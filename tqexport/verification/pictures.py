"""Pictures as the input of a network, and the classes that their folders are named after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from tqexport.errors import HostError, InputError
from tqexport.model import InputInfo
from tqexport.reading import limits

__all__ = ["PictureReader", "class_of", "takes_pictures"]

# Formats that Pillow decodes by itself: for PostScript it would start a program on the file.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def takes_pictures(signature: Sequence[InputInfo]) -> bool:
    """Whether a network takes pictures and nothing else: grey or RGB, float32 (1 or 3, H, W)."""
    (first, *others), channels = signature, (1, 3)
    return not others and first.dtype == "float32" and len(first.shape) == 3 and first.shape[0] in channels


class PictureReader:
    """Reads pictures for a network whose only input is grey or RGB."""

    def __init__(self, signature: Sequence[InputInfo], source: str) -> None:
        """Make sure that the network takes pictures.

        Args:
            signature: Its inputs.
            source: Where the pictures are, for people.

        Raises:
            InputError: It does not.
            HostError: Pillow is missing.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise HostError("reading pictures needs Pillow: pip install 'tqexport[report]'") from error
        self._image = Image
        if not takes_pictures(signature):
            takes = ", ".join(f"{info.dtype} {info.shape}" for info in signature)
            raise InputError(f"{source} holds pictures, but the network takes {takes}; give an NPZ file")
        self._shape = signature[0].shape

    def read(self, file: Path | IO[bytes], name: str) -> npt.NDArray[np.float32]:
        """One picture, scaled to the input of the network: float32 (C, H, W) in [0, 1], not normalised.

        Args:
            file: It, or where it is.
            name: Its name, for people.

        Raises:
            InputError: It is damaged, of another format, or too large.
        """
        channels, height, width = self._shape
        try:
            with self._image.open(file, formats=_FORMATS) as picture:
                if picture.width * picture.height > limits.PICTURE_PIXELS:
                    raise ValueError("it has too many pixels")
                plain = picture.convert("L" if channels == 1 else "RGB")
                # One axis after the other: which Pillow takes first depends on its version, and so do the last bits.
                narrow = plain.resize((width, plain.height), self._image.Resampling.BILINEAR)
                fitted = narrow.resize((width, height), self._image.Resampling.BILINEAR)
        except Exception as error:  # damage shows as whatever it leads Pillow to
            raise InputError(
                f"{name} is not a readable picture of at most {limits.PICTURE_PIXELS:,} pixels; remove it from the "
                "folder or replace it"
            ) from error
        values = np.asarray(fitted, np.float32).reshape(height, width, channels)
        return np.ascontiguousarray(np.moveaxis(values, -1, 0)) / np.float32(255)


def class_of(folder: str, class_names: Sequence[str], source: str) -> int:
    """The class that a folder of pictures is named after, by name or by index.

    Args:
        folder: Its name.
        class_names: Names of the network's outputs, if known.
        source: The folder, for people.

    Raises:
        InputError: It is named after none.
    """
    if folder in class_names:
        return list(class_names).index(folder)
    if folder.isdecimal() and (not class_names or int(folder) < len(class_names)):
        return int(folder)
    known = f"the network's are {', '.join(class_names)}" if class_names else "name it by the index of the output"
    raise InputError(f"{source} is named after no class; {known}")
