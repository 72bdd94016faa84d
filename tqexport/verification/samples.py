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

from tqexport.errors import InputError, about, first_line
from tqexport.model import InputInfo, Normalization, TruncModel
from tqexport.reading import limits
from tqexport.reading.archives import check_size
from tqexport.verification.pictures import PictureReader, class_of

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = [
    "Labels",
    "Samples",
    "checked_input",
    "checked_labels",
    "load_samples",
    "noise",
    "random_samples",
    "read_samples",
]


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
        raise InputError(f"{path} is not a readable NPZ file of numbers: {first_line(error)}") from error
    inputs = tuple(
        checked_input(path, name, values, info) for (name, values), info in zip(stored.items(), signature, strict=True)
    )
    if len({len(values) for values in inputs}) > 1:
        numbers = ", ".join(f"{len(values)} of {name}" for name, values in zip(stored, inputs, strict=True))
        raise InputError(f"{path}: there are {numbers}; give as many of each")
    if labels is not None and labels.shape != inputs[0].shape[:1]:
        raise InputError(f"{path}: labels are {labels.shape} for {len(inputs[0])} inputs")
    if labels is not None:
        checked_labels(path, labels, class_names)
    return Samples(inputs, labels, f"on the {len(inputs[0])} samples of {path.name}")


def checked_labels(source: object, labels: Labels, class_names: Sequence[str]) -> Labels:
    """Labels (N,), if they are classes of the network.

    Args:
        source: Where they are from, for people.
        labels: They.
        class_names: Names of the network's outputs, if known.

    Raises:
        InputError: They are others.
    """
    classes = len(class_names)
    if labels.min() < 0 or (classes and labels.max() >= classes):
        known = f", and the network has {classes} classes" if classes else ""
        raise InputError(f"{source}: labels are {labels.min()} to {labels.max()}{known}")
    return labels


def checked_input(source: object, name: str, values: npt.NDArray[Any], info: InputInfo) -> npt.NDArray[Any]:
    """The values of an input (N, *shape) in its dtype, if they are such values.

    Args:
        source: Where they are from, for people.
        name: What they are called there.
        values: They.
        info: The input.

    Raises:
        InputError: They are of another shape, or other numbers than the input takes.
    """
    if values.shape[1:] != info.shape or not values.ndim or not len(values):
        raise InputError(
            f"{source}: {name} are {values.shape}, the network takes {('N', *info.shape)}".replace("'N'", "N")
        )
    with np.errstate(all="ignore"):  # what does not fit is infinite or another number, and refused below
        converted = values.astype(info.dtype)
    if not (np.isfinite(values) & np.isfinite(converted)).all():
        raise InputError(f"{source}: {name} hold NaN or infinite values")
    if info.limit and not ((values == converted) & (values >= 0) & (values < info.limit)).all():
        raise InputError(f"{source}: {name} hold other numbers than the network's, which are 0 to {info.limit - 1}")
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
    reader = PictureReader(signature, f"the folder {path}")
    files = [
        (file, class_of(folder.name, class_names, str(folder)))
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(f"{path} holds no pictures; put those of each class into a subfolder named after the class")
    inputs = np.empty((len(files), *signature[0].shape), np.float32)
    for row, (file, _) in zip(inputs, files, strict=True):
        row[:] = reader.read(file, str(file))
    return inputs, np.array([label for _, label in files], np.int64)
