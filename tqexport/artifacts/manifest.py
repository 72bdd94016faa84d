"""``tqexport.json``: what an export folder holds, and from which checkpoint it came."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqexport.backends import BACKENDS
from tqexport.backends.base import EXACT, TensorInfo
from tqexport.errors import InputError, UsageError
from tqexport.files import exclusive, sha256_of, write_bytes
from tqexport.truncation import WIDTHS, Scheme

__all__ = ["FILE_NAME", "Artifact", "Manifest", "check_artifact", "enter_artifact", "read_manifest", "relative_to"]

FILE_NAME = "tqexport.json"
SCHEMA_VERSION = 1


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

    def find(self, kind: str, width: int, kernel: str = EXACT) -> Artifact | None:
        """The fixed artifact of a kind, width and kernel, if it was exported."""
        return next((a for a in self.artifacts if (a.kind, a.widths, a.kernel) == (kind, (width,), kernel)), None)

    def with_artifacts(self, added: Iterable[Artifact]) -> Manifest:
        """This manifest with artifacts added, or replaced where the file is the same."""
        merged = {artifact.file: artifact for artifact in (*self.artifacts, *added)}
        ordered = sorted(merged.values(), key=lambda artifact: (artifact.kind, artifact.widths, artifact.kernel))
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(f"{path} has schema version {version}, this tqexport reads {SCHEMA_VERSION}; export again")
        artifacts = tuple(_artifact(entry) for entry in content.pop("artifacts"))
        for key in ("widths", "input_shape"):
            content[key] = tuple(int(value) for value in content[key])
        scheme = {field.name: content.pop(field.name) for field in fields(Scheme) if field.name in content}
        return Manifest(**content, scheme=Scheme(**scheme), artifacts=artifacts)
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); export again") from error


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


def check_artifact(folder: Path, artifact: Artifact) -> Path:
    """The path of an artifact whose bytes are those that were exported, as are those of the files beside it.

    Raises:
        InputError: One of them is gone or was changed.
    """
    for name, sha256 in {artifact.file: artifact.sha256, **artifact.companions}.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is in {FILE_NAME} but not in the folder; export it again")
        if sha256_of(path) != sha256:
            raise InputError(
                f"{path} is not the file that was exported (its sha256 differs from {FILE_NAME}); export again"
            )
    return folder / artifact.file


def relative_to(path: Path, folder: Path) -> str:
    """``path`` as seen from ``folder``, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _artifact(entry: dict[str, Any]) -> Artifact:
    """An artifact from its entry in ``tqexport.json``."""
    for key in ("inputs", "outputs"):
        entry[key] = tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in entry[key])
    entry["widths"] = tuple(int(bits) for bits in entry["widths"])
    entry["truncatable_to"] = tuple(int(bits) for bits in entry.get("truncatable_to", ()))
    for key in ("companions", "cut_from", "versions"):
        entry[key] = {str(name): str(value) for name, value in entry.get(key, {}).items()}
    for name in (entry["file"], *entry["companions"]):
        if Path(name).name != name:
            raise ValueError(f"artifact {name!r} is not in the folder")
    artifact = Artifact(**entry)
    if not artifact.widths or not {*artifact.widths} <= {*WIDTHS}:
        raise ValueError(f"{artifact.file} has the widths {artifact.widths}")
    if artifact.kind not in BACKENDS:
        raise ValueError(f"{artifact.file} is of the kind {artifact.kind!r}, which this tqexport does not have")
    if artifact.kernel not in BACKENDS[artifact.kind].kernels:
        raise ValueError(f"{artifact.file} has the kernel {artifact.kernel!r}, which {artifact.kind} does not have")
    return artifact
