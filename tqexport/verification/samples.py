"""What networks are compared on: random numbers, an NPZ file, or a folder of pictures."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import HostError, InputError, about
from tqexport.model import Normalization, TruncModel
from tqexport.reading import limits
from tqexport.reading.archives import check_size

__all__ = ["Samples", "load_samples", "noise", "random_samples", "read_samples"]

# Formats that Pillow decodes by itself: for PostScript it would start a program on the file.
_PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Inputs = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """What the networks are compared on.

    Attributes:
        inputs: float32 (N, *input_shape), normalised where nothing else is said.
        labels: Class of each sample (N,), if known.
        description: Where they come from, for people.
    """

    inputs: Inputs
    labels: Labels | None
    description: str

    def normalized(self, normalization: Normalization | None) -> Samples:
        """Raw inputs (N, C, ...) as a network wants them: ``(x - mean) / std`` per channel, float32."""
        if normalization is None:
            return self
        shape = (1, -1, *[1] * (self.inputs.ndim - 2))
        mean, std = (np.array(values, np.float32).reshape(shape) for values in (normalization.mean, normalization.std))
        return replace(self, inputs=(self.inputs - mean) / std)


def random_samples(model: TruncModel, count: int) -> Samples:
    """Noise, normalised as the network's real inputs are."""
    return noise(count, model.info.input_shape).normalized(model.info.normalization)


def noise(count: int, input_shape: Sequence[int]) -> Samples:
    """Uniform random numbers in [0, 1], always the same, before normalisation."""
    inputs = np.random.default_rng(0).random((count, *input_shape), np.float32)
    return Samples(inputs, None, f"on {count} random samples")


def load_samples(path: Path, model: TruncModel) -> Samples:
    """Read samples for a network, and normalise them as it wants; see :func:`read_samples`."""
    return read_samples(path, model.info.input_shape, model.info.class_names).normalized(model.info.normalization)


def read_samples(path: Path, input_shape: tuple[int, ...], class_names: Sequence[str] = ()) -> Samples:
    """Read samples before normalisation.

    Args:
        path: An NPZ file with ``inputs`` (N, *input_shape) and optionally ``labels`` (N,); or a folder with one
            subfolder of pictures for each class, named after the class or its index.
        input_shape: Shape of one sample, channels first. Pictures are scaled to it, grey or RGB, values in [0, 1].
        class_names: Names of the network's outputs, if known.

    Raises:
        InputError: Nothing is there, it is damaged, or it does not fit the network.
        HostError: Pictures cannot be read because Pillow is missing.
    """
    labels: Labels | None
    if path.is_dir():
        inputs, labels = _read_folder(path, input_shape, class_names)
        return Samples(inputs, labels, f"on the {len(inputs)} pictures of {path.name or path}")
    if not path.is_file():
        raise InputError(f"{path} does not exist; name an NPZ file with inputs and labels, or a folder of pictures")
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            with np.errstate(all="ignore"):  # what does not fit float32 is infinite there, and refused below
                inputs = np.asarray(_numbers(file["inputs"], "inputs"), np.float32)
            labels = _whole(_numbers(file["labels"], "labels")) if "labels" in file else None
    except KeyError as error:
        raise InputError(f"{path} holds no array named inputs") from error
    except InputError:
        raise
    except Exception as error:  # damage shows as whatever it leads zipfile and numpy to
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} is not a readable NPZ file of numbers: {said}") from error
    if inputs.shape[1:] != input_shape or not len(inputs):
        raise InputError(f"{path}: inputs are {inputs.shape}, the network takes (N, {str(input_shape)[1:]}")
    if labels is not None and labels.shape != inputs.shape[:1]:
        raise InputError(f"{path}: labels are {labels.shape} for {len(inputs)} inputs")
    classes = len(class_names)
    if labels is not None and (labels.min() < 0 or (classes and labels.max() >= classes)):
        known = f", and the network has {classes} classes" if classes else ""
        raise InputError(f"{path}: labels are {labels.min()} to {labels.max()}{known}")
    if not np.isfinite(inputs).all():
        raise InputError(f"{path}: inputs hold NaN or infinite values")
    return Samples(inputs, labels, f"on the {len(inputs)} samples of {path.name}")


def _numbers(values: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Refuse an array of anything but real numbers."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} are of the type {values.dtype}")
    return values


def _whole(values: npt.NDArray[Any]) -> Labels:
    """Labels, which may be stored in floats."""
    with np.errstate(all="ignore"):
        labels = values.astype(np.int64)
    if (labels != values).any():
        raise ValueError("labels are not whole numbers")
    return labels


def _check_size(path: Path) -> None:
    """Refuse a file that unpacks to more than memory should bear."""
    most = max(limits.SAMPLES_RATIO * path.stat().st_size, limits.SAMPLES_SMALL)
    with about(f"{path}"), zipfile.ZipFile(path) as archive:
        check_size(archive, min(most, limits.SAMPLES_BYTES))


def _read_folder(path: Path, input_shape: tuple[int, ...], class_names: Sequence[str]) -> tuple[Inputs, Labels]:
    """The pictures of a folder, in the order of their names, and the classes that their subfolders stand for."""
    try:
        from PIL import Image
    except ImportError as error:
        raise HostError("reading pictures needs Pillow: pip install 'tqexport[report]'") from error
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise InputError(f"{path} is a folder of pictures, but the network takes {input_shape}; give an NPZ file")
    channels, height, width = input_shape
    files = [
        (file, _class_of(folder, class_names))
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(f"{path} holds no pictures; put those of each class into a subfolder named after the class")
    inputs = np.empty((len(files), *input_shape), np.float32)
    for row, (file, _) in zip(inputs, files, strict=True):
        try:
            with Image.open(file, formats=_PICTURE_FORMATS) as picture:
                if picture.width * picture.height > limits.PICTURE_PIXELS:
                    raise ValueError("it has too many pixels")
                fitted = picture.convert("L" if channels == 1 else "RGB").resize(
                    (width, height), Image.Resampling.BILINEAR
                )
        except Exception as error:  # damage shows as whatever it leads Pillow to
            raise InputError(
                f"{file} is not a readable picture of at most {limits.PICTURE_PIXELS:,} pixels; remove it from the "
                "folder or replace it"
            ) from error
        row[:] = np.moveaxis(np.asarray(fitted, np.float32).reshape(height, width, channels), -1, 0) / 255
    return inputs, np.array([label for _, label in files], np.int64)


def _class_of(folder: Path, class_names: Sequence[str]) -> int:
    """The class that a folder of pictures is named after, by name or by index."""
    if folder.name in class_names:
        return list(class_names).index(folder.name)
    if folder.name.isdecimal() and (not class_names or int(folder.name) < len(class_names)):
        return int(folder.name)
    known = f"the network's are {', '.join(class_names)}" if class_names else "name it by the index of the output"
    raise InputError(f"{folder} is named after no class; {known}")
