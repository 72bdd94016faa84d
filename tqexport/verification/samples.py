"""What networks are compared on: random numbers, an NPZ file, or a folder of pictures."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import HostError, InputError, about
from tqexport.model import InputInfo, Normalization, TruncModel
from tqexport.reading import limits
from tqexport.reading.archives import check_size

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = ["Samples", "load_samples", "noise", "random_samples", "read_samples", "takes_pictures"]

# Formats that Pillow decodes by itself: for PostScript it would start a program on the file.
_PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """What the networks are compared on.

    Attributes:
        inputs: An array (N, *shape) for each input of the network, the first normalised where nothing else is said.
        labels: Class of each sample (N,), if known.
        description: Where they come from, for people.
    """

    inputs: Batch
    labels: Labels | None
    description: str

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def sha256(self) -> str:
        """Hash of inputs and labels (int64), little-endian, one array after the other; hex."""
        digest = hashlib.sha256()
        for values in self.inputs:
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def normalized(self, normalization: Normalization | None) -> Samples:
        """The first input, raw (N, C, ...), as a network wants it: ``(x - mean) / std`` per channel, float32."""
        if normalization is None:
            return self
        first, *others = self.inputs
        shape = (1, -1, *[1] * (first.ndim - 2))
        mean, std = (np.array(values, np.float32).reshape(shape) for values in (normalization.mean, normalization.std))
        return replace(self, inputs=((first - mean) / std, *others))


def random_samples(model: TruncModel, count: int) -> Samples:
    """Noise, normalised as the network's real inputs are."""
    return noise(count, model.info.signature).normalized(model.info.normalization)


def noise(count: int, signature: Sequence[InputInfo]) -> Samples:
    """Uniform random numbers in [0, 1), or whole ones in the range of the input, always the same; not normalised."""
    generator = np.random.default_rng(0)

    def values(info: InputInfo) -> npt.NDArray[Any]:
        shape = (count, *info.shape)
        if info.dtype == "float32":
            return generator.random(shape, np.float32)
        return generator.integers(0, info.limit, shape).astype(info.dtype)

    return Samples(tuple(map(values, signature)), None, f"on {count} random samples")


def load_samples(path: Path, model: TruncModel) -> Samples:
    """Read samples for a network, and normalise them as it wants; see :func:`read_samples`."""
    return read_samples(path, model.info.signature, model.info.class_names).normalized(model.info.normalization)


def takes_pictures(signature: Sequence[InputInfo]) -> bool:
    """Whether a network takes pictures and nothing else: grey or RGB, float32 (1 or 3, H, W)."""
    (first, *others), channels = signature, (1, 3)
    return not others and first.dtype == "float32" and len(first.shape) == 3 and first.shape[0] in channels


def read_samples(path: Path, signature: Sequence[InputInfo], class_names: Sequence[str] = ()) -> Samples:
    """Read samples before normalisation.

    Args:
        path: An NPZ file with an array (N, *shape) for each input, by its name (``inputs`` where there is one), and
            optionally ``labels`` (N,); or a folder with one subfolder of pictures for each class, named after the class
            or its index.
        signature: The inputs. Pictures are scaled to the shape of the only one, grey or RGB, values in [0, 1].
        class_names: Names of the network's outputs, if known.

    Raises:
        InputError: Nothing is there, it is damaged, or it does not fit the network.
        HostError: Pictures cannot be read because Pillow is missing.
    """
    labels: Labels | None
    if path.is_dir():
        pictures, labels = _read_folder(path, signature, class_names)
        return Samples((pictures,), labels, f"on the {len(pictures)} pictures of {path.name or path}")
    if not path.is_file():
        raise InputError(f"{path} does not exist; name an NPZ file with inputs and labels, or a folder of pictures")
    name = "inputs"
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            stored = {}
            for info in signature:
                name = info.name if info.name in file or len(signature) > 1 else "inputs"
                stored[name] = _numbers(file[name], name)
            labels = _whole(_numbers(file["labels"], "labels")) if "labels" in file else None
    except KeyError as error:
        raise InputError(f"{path} holds no array named {name}") from error
    except InputError:
        raise
    except Exception as error:  # damage shows as whatever it leads zipfile and numpy to
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} is not a readable NPZ file of numbers: {said}") from error
    inputs = tuple(
        _checked(path, name, values, info) for (name, values), info in zip(stored.items(), signature, strict=True)
    )
    if len({len(values) for values in inputs}) > 1:
        numbers = ", ".join(f"{len(values)} of {name}" for name, values in zip(stored, inputs, strict=True))
        raise InputError(f"{path}: there are {numbers}; give as many of each")
    if labels is not None and labels.shape != inputs[0].shape[:1]:
        raise InputError(f"{path}: labels are {labels.shape} for {len(inputs[0])} inputs")
    classes = len(class_names)
    if labels is not None and (labels.min() < 0 or (classes and labels.max() >= classes)):
        known = f", and the network has {classes} classes" if classes else ""
        raise InputError(f"{path}: labels are {labels.min()} to {labels.max()}{known}")
    return Samples(inputs, labels, f"on the {len(inputs[0])} samples of {path.name}")


def _checked(path: Path, name: str, values: npt.NDArray[Any], info: InputInfo) -> npt.NDArray[Any]:
    """The values of an input (N, *shape) in its dtype, if they are such values."""
    if values.shape[1:] != info.shape or not values.ndim or not len(values):
        raise InputError(
            f"{path}: {name} are {values.shape}, the network takes {('N', *info.shape)}".replace("'N'", "N")
        )
    with np.errstate(all="ignore"):  # what does not fit is infinite or another number, and refused below
        converted = values.astype(info.dtype)
    if not (np.isfinite(values) & np.isfinite(converted)).all():
        raise InputError(f"{path}: {name} hold NaN or infinite values")
    if info.limit and not ((values == converted) & (values >= 0) & (values < info.limit)).all():
        raise InputError(f"{path}: {name} hold other numbers than the network's, which are 0 to {info.limit - 1}")
    return converted


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


def _read_folder(
    path: Path, signature: Sequence[InputInfo], class_names: Sequence[str]
) -> tuple[npt.NDArray[np.float32], Labels]:
    """The pictures of a folder, in the order of their names, and the classes that their subfolders stand for."""
    try:
        from PIL import Image
    except ImportError as error:
        raise HostError("reading pictures needs Pillow: pip install 'tqexport[report]'") from error
    if not takes_pictures(signature):
        takes = ", ".join(f"{info.dtype} {info.shape}" for info in signature)
        raise InputError(f"{path} is a folder of pictures, but the network takes {takes}; give an NPZ file")
    shape = channels, height, width = signature[0].shape
    files = [
        (file, _class_of(folder, class_names))
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(f"{path} holds no pictures; put those of each class into a subfolder named after the class")
    inputs = np.empty((len(files), *shape), np.float32)
    for row, (file, _) in zip(inputs, files, strict=True):
        try:
            with Image.open(file, formats=_PICTURE_FORMATS) as picture:
                if picture.width * picture.height > limits.PICTURE_PIXELS:
                    raise ValueError("it has too many pixels")
                plain = picture.convert("L" if channels == 1 else "RGB")
                # One axis after the other: which Pillow takes first depends on its version, and so do the last bits.
                narrow = plain.resize((width, plain.height), Image.Resampling.BILINEAR)
                fitted = narrow.resize((width, height), Image.Resampling.BILINEAR)
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
