"""Samples in parts: NPZ files, WebDataset archives and folders of pictures, wherever fsspec reaches."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError, about, first_line
from tqexport.files import temporary_folder
from tqexport.model import InputInfo, Normalization
from tqexport.reading import limits
from tqexport.verification.pictures import PictureReader, class_of
from tqexport.verification.samples import Samples, checked_input, checked_labels, read_samples

__all__ = ["PICTURES_IN_SHARD", "SampleFormat", "Shard", "find_shards", "read_shard"]

PICTURES_IN_SHARD = 512  # of a folder; half a second of reading, so that a worker that is lost loses little

_ARCHIVES = (".npz", ".tar")
_LABEL = "cls"  # what WebDataset calls the file of a sample that holds its class
_PICTURES = ("bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp")
# What the file systems call the time of the last change, or a hash of the content.
_CHANGES = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash", "crc32c")

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class SampleFormat:
    """What a network takes.

    Attributes:
        signature: Its inputs.
        normalization: What is done to raw values.
        class_names: Names of its outputs, if known.
    """

    signature: tuple[InputInfo, ...]
    normalization: Normalization | None
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """Samples that one worker takes at once.

    Attributes:
        name: Where they are, for people.
        files: URL of the NPZ file or the archive, or of each picture of a folder.
        classes: The class of each picture; empty for other files.
        key: SHA-256 of names, sizes and times of the files, hex, by which a shard that was done is known again.
    """

    name: str
    files: tuple[str, ...]
    classes: tuple[int, ...]
    key: str


def find_shards(patterns: Iterable[str], taken: SampleFormat) -> list[Shard]:
    """The shards that some patterns name, each once, in the order of their names.

    Args:
        patterns: Paths or URLs that fsspec opens, ``*``, ``?`` and ``[...]`` allowed, of NPZ files (see
            :func:`tqexport.verification.samples.read_samples`), of ``.tar`` archives in the way of WebDataset, or of
            folders with such files, or with a folder of pictures per class.
        taken: What the network takes.

    Raises:
        InputError: A pattern names nothing, or what is no sample.
    """
    shards: dict[str, Shard] = {}
    for pattern in patterns:
        for shard in _shards_of(pattern, taken):
            shards.setdefault(shard.key, shard)
    return sorted(shards.values(), key=lambda shard: (shard.name, shard.key))


def read_shard(shard: Shard, taken: SampleFormat, count: int) -> Iterator[Samples]:
    """The samples of a shard, ``count`` at a time, normalised.

    An NPZ file is read whole, pictures and archives as they are needed.

    Raises:
        InputError: A file is gone, damaged or does not fit the network.
        HostError: A package is missing.
    """
    if shard.classes:
        parts = _pictures(shard, taken, count)
    elif shard.files[0].endswith(".npz"):
        parts = _arrays(shard.files[0], taken, count)
    else:
        parts = _archived(shard.files[0], taken, count)
    for samples in parts:
        yield samples.normalized(taken.normalization)


def _shards_of(pattern: str, taken: SampleFormat) -> Iterator[Shard]:
    """The shards that one pattern names."""
    from fsspec.core import has_magic, url_to_fs

    missing = f"{pattern} does not exist; name NPZ files, .tar archives or folders of pictures"
    try:
        system, path = url_to_fs(pattern)
        chosen: Mapping[str, Mapping[str, Any]]
        chosen = system.glob(path, detail=True) if has_magic(path) else {path: system.info(path)}
    except FileNotFoundError as error:
        raise InputError(missing) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{pattern} cannot be read: {error}") from error
    except ImportError as error:
        raise InputError(f"{pattern} needs a package that fsspec does not bring: {error}") from error
    if not chosen:
        raise InputError(missing)
    for name, info in sorted(chosen.items()):
        if info["type"] == "directory":
            yield from _shards_of_folder(system, name, taken)
        elif name.endswith(_ARCHIVES):
            yield _shard(system, [info])
        else:
            raise InputError(f"{name} is neither an NPZ file nor a .tar archive nor a folder of pictures")


def _shards_of_folder(system: Any, folder: str, taken: SampleFormat) -> Iterator[Shard]:
    """The archives of a folder, or its pictures, some hundred at a time."""
    infos = [info for _, info in sorted(system.find(folder, detail=True, maxdepth=2).items())]
    archives = [info for info in infos if info["name"].endswith(_ARCHIVES)]
    if archives:
        yield from (_shard(system, [info]) for info in archives)
        return
    pictures = []
    for info in infos:
        inner = PurePosixPath(info["name"]).relative_to(PurePosixPath(folder))
        if len(inner.parts) == 2 and not any(part.startswith(".") for part in inner.parts):
            pictures.append((info, class_of(inner.parts[0], taken.class_names, f"{folder}/{inner.parts[0]}")))
    if not pictures:
        raise InputError(f"{folder} holds neither NPZ files nor .tar archives nor a folder of pictures per class")
    PictureReader(taken.signature, folder)  # refuses before anything is started what cannot be read
    for part in _in_parts(pictures, PICTURES_IN_SHARD):
        yield _shard(system, [info for info, _ in part], tuple(label for _, label in part))


def _shard(system: Any, infos: Sequence[Mapping[str, Any]], classes: tuple[int, ...] = ()) -> Shard:
    """A shard of some files."""
    digest = hashlib.sha256(repr(classes).encode())
    for info in infos:
        known = [info["name"], info.get("size"), *(str(info[name]) for name in _CHANGES if name in info)]
        digest.update(repr(known).encode())
    files = tuple(str(system.unstrip_protocol(info["name"])) for info in infos)
    first = str(infos[0]["name"])
    name = f"{first} and {len(infos) - 1} more" if len(infos) > 1 else first
    return Shard(name, files, classes, digest.hexdigest())


def _in_parts(values: Iterable[_Value], count: int) -> Iterator[list[_Value]]:
    """Values in lists of ``count``, the last of which may be shorter."""
    rest = iter(values)
    while part := list(islice(rest, count)):
        yield part


def _open(url: str) -> IO[bytes]:
    """A file to read from."""
    import fsspec

    try:
        stream: IO[bytes] = fsspec.open(url, "rb").open()
    except (OSError, ValueError) as error:
        raise InputError(f"{url} cannot be read: {error}") from error
    return stream


def _arrays(url: str, taken: SampleFormat, count: int) -> Iterator[Samples]:
    """The samples of an NPZ file, which is copied first where it is not on this machine."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    if "file" in system.protocol:
        samples = read_samples(Path(path), taken.signature, taken.class_names)
    else:
        with temporary_folder() as folder, about(f"{url}:"):
            copy = folder / PurePosixPath(path).name
            try:
                system.get_file(path, str(copy))
            except (OSError, ValueError) as error:
                raise InputError(f"cannot be read: {error}") from error
            samples = read_samples(copy, taken.signature, taken.class_names)
    for start in range(0, len(samples), count):
        rows = slice(start, start + count)
        labels = None if samples.labels is None else samples.labels[rows]
        yield replace(samples, inputs=tuple(values[rows] for values in samples.inputs), labels=labels)


def _pictures(shard: Shard, taken: SampleFormat, count: int) -> Iterator[Samples]:
    """The pictures of a folder."""
    reader = PictureReader(taken.signature, shard.name)
    for part in _in_parts(zip(shard.files, shard.classes, strict=True), count):
        pictures = []
        for url, _ in part:
            with _open(url) as stream:
                pictures.append(reader.read(stream, url))
        labels = np.array([label for _, label in part], np.int64)
        yield Samples((np.stack(pictures),), labels, shard.name)


def _archived(url: str, taken: SampleFormat, count: int) -> Iterator[Samples]:
    """The samples of an archive in the way of WebDataset: files of one sample stand together and share a name.

    Of a sample ``NAME`` there is a picture (``NAME.png``), or for each input an array of one sample
    (``NAME.<input>.npy``, where there is one input also ``NAME.npy``); and optionally its class in digits
    (``NAME.cls``).
    """
    for part in _in_parts(_samples_of(url, taken), count):
        labels = [label for _, label in part]
        if None in labels and any(label is not None for label in labels):
            raise InputError(f"{url}: some samples have a class (.{_LABEL}) and others have none")
        inputs = tuple(np.stack(values) for values in zip(*(values for values, _ in part), strict=True))
        given = None if None in labels else checked_labels(url, np.array(labels, np.int64), taken.class_names)
        yield Samples(inputs, given, url)


def _samples_of(url: str, taken: SampleFormat) -> Iterator[tuple[tuple[npt.NDArray[Any], ...], int | None]]:
    """Each sample of an archive, an array for each input, and its class."""
    reader: PictureReader | None = None
    empty = True
    for name, files in _grouped(url):
        where, inputs = f"{url}: {name}", []
        picture = next((ending for ending in files if ending in _PICTURES), None)
        if picture is not None:
            reader = reader or PictureReader(taken.signature, url)
            inputs = [reader.read(io.BytesIO(files[picture]), f"{where}.{picture}")]
        else:
            for info in taken.signature:
                ending = "npy" if len(taken.signature) == 1 and "npy" in files else f"{info.name}.npy"
                if ending not in files:
                    raise InputError(f"{where} has neither a picture nor {name}.{ending}")
                values = _array(files[ending], f"{where}.{ending}")
                inputs.append(checked_input(url, f"{name}.{ending}", values[np.newaxis], info)[0])
        label = None
        if _LABEL in files:
            digits = files[_LABEL].strip()
            if not digits.isdigit() or len(digits) > 9:
                raise InputError(f"{where}.{_LABEL} is no class in digits")
            label = int(digits)
        empty = False
        yield tuple(inputs), label
    if empty:
        raise InputError(f"{url} holds no samples")


def _grouped(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The files of each sample of an archive by their ending, in the order of the archive."""
    name, files = "", dict[str, bytes]()
    try:
        with _open(url) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.name.startswith("."):
                    continue
                stem, _, ending = path.name.partition(".")
                if (sample := str(path.parent / stem)) != name:
                    if files:
                        yield name, files
                    name, files = sample, {}
                if member.size + sum(map(len, files.values())) > limits.SAMPLES_SMALL:
                    raise InputError(f"{url}: {sample} takes more than {limits.SAMPLES_SMALL:,} bytes")
                content = archive.extractfile(member)
                files[ending.lower()] = b"" if content is None else content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{url} is not a readable .tar archive: {error}") from error
    if files:
        yield name, files


def _array(content: bytes, source: str) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file."""
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
            raise ValueError("it holds no numbers")
    except Exception as error:  # damage shows as whatever it leads numpy to
        raise InputError(f"{source} is not a readable array: {first_line(error)}") from error
    return values
