"""``tqexport.json``: what an export folder holds, and from which checkpoint it came."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqexport.backends import BACKENDS
from tqexport.backends.base import EXACT, TensorInfo, batch_of
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import InputError, about
from tqexport.facts import scheme_of
from tqexport.files import exclusive, write_bytes
from tqexport.reading import limits, records
from tqexport.reading.files import read_bytes
from tqexport.truncation import WIDTHS, Scheme

__all__ = ["FILE_NAME", "Artifact", "Manifest", "enter_artifact", "read_artifact", "read_manifest", "relative_to"]

FILE_NAME = "tqexport.json"
"""The manifest's name in its export folder."""
SCHEMA_VERSION = 1
_LONGEST_NAME = 255  # bytes between two slashes


@dataclass(frozen=True)
class Artifact:
    """One exported file.

    Attributes:
        file: Name in the export folder.
        kind: Name of the back end that wrote it, e.g. ``onnx``.
        widths: Bits of its weights; several where the width is chosen as it runs.
        layout: ``channels first`` or ``channels last``.
        sha256: Hash of the file, hex.
        bytes: Its size.
        inputs: Its inputs.
        outputs: Its outputs.
        kernel: How it multiplies: ``exact``, or another of the back end's kernels.
        truncatable_to: The other widths that can be cut from a fixed file.
        companions: The files that were written beside it: sha256, hex, by name.
        cut_from: The artifact that it was cut from, if it was: its ``file`` name and ``sha256``.
        versions: Of what made it, by name.
    """

    file: str
    kind: str
    widths: tuple[int, ...]
    layout: str
    sha256: str
    bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    kernel: str = EXACT
    truncatable_to: tuple[int, ...] = ()
    companions: Mapping[str, str] = field(default_factory=dict)
    cut_from: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def batch(self) -> int | None:
        """How many samples it takes at once; None for any number."""
        return batch_of(self.inputs)


@dataclass(frozen=True)
class Manifest:
    """An export folder's contents.

    Attributes:
        checkpoint: Path of the checkpoint, relative to the manifest.
        checkpoint_sha256: Its hash, hex.
        options: How the checkpoint was read, where the file does not say it.
        scheme: How its weights were quantised.
        widths: Every width that the checkpoint can be exported at.
        input_shape: Shape of one sample of the first input, channels first; the artifacts have all inputs.
        artifacts: The exported files.
    """

    checkpoint: str
    checkpoint_sha256: str
    scheme: Scheme
    widths: tuple[int, ...]
    input_shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()

    def is_like(self, other: Manifest) -> bool:
        """Whether both are of the same checkpoint, read in the same way."""
        mine, others = ((m.checkpoint, m.checkpoint_sha256, dict(m.options)) for m in (self, other))
        return mine == others

    def holds(self, artifact: Artifact) -> bool:
        """Whether there is a file of the same name and content."""
        return any((a.file, a.sha256) == (artifact.file, artifact.sha256) for a in self.artifacts)

    def find(self, kind: str, width: int, kernel: str = EXACT, batch: int | None = None) -> Artifact | None:
        """The fixed artifact of a kind, width, kernel and number of samples at once, if it was exported."""
        wanted = (kind, (width,), kernel, batch)
        return next((a for a in self.artifacts if (a.kind, a.widths, a.kernel, a.batch) == wanted), None)

    def with_artifacts(self, added: Iterable[Artifact]) -> Manifest:
        """This manifest with artifacts added, or replaced where the file is the same."""
        merged = {artifact.file: artifact for artifact in (*self.artifacts, *added)}
        ordered = sorted(merged.values(), key=lambda a: (a.kind, a.widths, a.kernel, a.batch or 0))
        return replace(self, artifacts=tuple(ordered))

    def write(self, folder: Path) -> None:
        """Write ``tqexport.json`` into a folder, whole or not at all."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        content.update(content.pop("scheme"))
        write_bytes(folder / FILE_NAME, (json.dumps(content, indent=2) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read ``tqexport.json`` of an export folder.

    Raises:
        InputError: There is none, or it is damaged or of another version.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no {FILE_NAME}; run tqexport onnx CHECKPOINT first, or name an export folder")
    content = read_bytes(path, limits.JSON_BYTES)
    with about(f"{path} is damaged; export again:"):
        record = records.mapping(records.parse_json(content), "the document")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {version!r}, this tqexport reads {SCHEMA_VERSION}; export again")
    with about(f"{path} is damaged; export again:"):
        return _manifest(record)


def enter_artifact(
    folder: Path, artifact: Artifact, files: Mapping[str, bytes], choose: Callable[[Manifest | None], Manifest]
) -> Manifest:
    """Write an artifact into an export folder and enter it into the manifest, while no other run does.

    Args:
        folder: The folder.
        artifact: The entry.
        files: What is written, by name: the artifact itself, last, and what lies beside it.
        choose: The manifest that the artifact is added to, given the one that the folder has by then, or None.

    Returns:
        The manifest as it was written.

    Raises:
        InputError: The manifest is damaged.
        HostError: The folder cannot be written.
    """
    with exclusive(folder):
        manifest = choose(read_manifest(folder) if (folder / FILE_NAME).is_file() else None).with_artifacts([artifact])
        for name, content in files.items():
            write_bytes(folder / name, content)
        manifest.write(folder)
    return manifest


def read_artifact(folder: Path, artifact: Artifact) -> bytes:
    """The content of an artifact, whose bytes are those that were exported, as are those of the files beside it.

    Raises:
        InputError: One of them is gone or was changed.
    """
    for name, sha256 in artifact.companions.items():
        _read(folder / name, sha256)
    return _read(folder / artifact.file, artifact.sha256)


def _read(path: Path, sha256: str) -> bytes:
    """The content of an exported file, read once, so that it is of the very bytes whose hash was looked at."""
    if not path.is_file():
        raise InputError(f"{path} is in {FILE_NAME} but not in the folder; export it again")
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            f"{path} is not the file that was exported (its sha256 differs from {FILE_NAME}); export again"
        )
    return content


def relative_to(path: Path, folder: Path) -> str:
    """``path`` as seen from ``folder``, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _manifest(record: Mapping[str, Any]) -> Manifest:
    """A manifest from the document that :meth:`Manifest.write` writes."""
    known = {item.name for item in (*fields(Manifest), *fields(Scheme))} | {"schema_version"}
    _check_entries(record, known - {"scheme"}, {"options", "artifacts"} | {item.name for item in fields(Scheme)})
    scheme = {item.name: record[item.name] for item in fields(Scheme) if item.name in record}
    entries = record["artifacts"] if isinstance(record.get("artifacts"), list) else None
    if entries is None:
        raise InputError("artifacts is no list")
    widths = records.wholes(record["widths"], "widths", WIDTHS)
    if not widths or len({*widths}) != len(widths):
        raise InputError(f"widths are {widths}")
    return Manifest(
        checkpoint=_path(record["checkpoint"], "checkpoint"),
        checkpoint_sha256=records.text(record["checkpoint_sha256"], "checkpoint_sha256"),
        scheme=scheme_of(scheme),
        widths=widths,
        input_shape=records.shape(record["input_shape"], "input_shape"),
        options=ReadOptions.from_record(records.plain(record.get("options", {}), "options")).given(),
        artifacts=tuple(_artifact(records.mapping(entry, "an artifact")) for entry in entries),
    )


def _check_entries(record: Mapping[str, Any], known: Collection[str], optional: Collection[str]) -> None:
    """Refuse a record that lacks an entry, or has one that this version does not know."""
    if missing := sorted({*known} - {*optional} - {*record}):
        raise InputError(f"there is no {missing[0]}")
    if unknown := sorted({*record} - {*known}):
        raise InputError(f"{unknown[0]!r} is not known to this tqexport; update it")


def _path(value: Any, name: str) -> str:
    """A path that the system can be asked for."""
    path = records.text(value, name)
    if not path or "\0" in path or max(map(len, path.encode().split(b"/"))) > _LONGEST_NAME:
        raise InputError(f"{name} is no path")
    return path


def _texts_by_name(value: Any, name: str) -> dict[str, str]:
    """Texts by name."""
    return {records.text(key, name): records.text(said, name) for key, said in records.mapping(value, name).items()}


def _ends(value: Any, name: str) -> tuple[TensorInfo, ...]:
    """Inputs or outputs of an artifact."""
    if not isinstance(value, list):
        raise InputError(f"{name} is no list")
    infos = []
    for entry in value:
        tensor = records.mapping(entry, name)
        _check_entries(tensor, {"name", "dtype", "shape"}, ())
        shape = tensor["shape"]
        if not isinstance(shape, list) or not all(isinstance(size, str) or type(size) is int for size in shape):
            raise InputError(f"{name} have no shape")
        name, dtype = (records.text(tensor[key], key) for key in ("name", "dtype"))
        infos.append(TensorInfo(name, dtype, tuple(shape)))
    return tuple(infos)


def _artifact(entry: dict[str, Any]) -> Artifact:
    """An artifact from its entry in ``tqexport.json``."""
    known = {item.name for item in fields(Artifact)}
    _check_entries(entry, known, {"kernel", "truncatable_to", "companions", "cut_from", "versions"})
    companions = records.mapping(entry.get("companions", {}), "companions")
    artifact = Artifact(
        **{key: records.text(entry[key], key) for key in ("kind", "layout", "sha256")},
        file=_path(entry["file"], "file"),
        widths=records.wholes(entry["widths"], "widths", WIDTHS),
        bytes=records.whole(entry["bytes"], "bytes", high=2**63 - 1),
        inputs=_ends(entry["inputs"], "inputs"),
        outputs=_ends(entry["outputs"], "outputs"),
        kernel=records.text(entry.get("kernel", EXACT), "kernel"),
        truncatable_to=records.wholes(entry.get("truncatable_to", ()), "truncatable_to", WIDTHS),
        cut_from=_texts_by_name(entry.get("cut_from", {}), "cut_from"),
        versions=_texts_by_name(entry.get("versions", {}), "versions"),
        companions={_path(name, "companion"): records.text(sha256, "sha256") for name, sha256 in companions.items()},
    )
    for name in (artifact.file, *artifact.companions):
        if Path(name).name != name:
            raise InputError(f"artifact {name!r} is not in the folder")
    if not artifact.widths:
        raise InputError(f"{artifact.file} has no width")
    if artifact.kind not in BACKENDS:
        raise InputError(f"{artifact.file} is of the kind {artifact.kind!r}, which this tqexport does not have")
    if artifact.kernel not in BACKENDS[artifact.kind].kernels:
        raise InputError(f"{artifact.file} has the kernel {artifact.kernel!r}, which {artifact.kind} does not have")
    with about(artifact.file):
        batch_of(artifact.inputs)  # which refuses what no export takes
    return artifact
