"""From one artifact with several widths to the fixed file of one width, without the network it came from.

Run-time files hold several widths, and so do ONNX files that were exported with ``--truncatable``. The result is, byte
for byte, what exporting the checkpoint at that width gives (without ``--truncatable``); the artifact carries the hash
of each fixed file, so a result that differs is never handed out. Needs what the format's files need (onnx, or
flatbuffers) and numpy: neither torch, nor TensorFlow, nor a runtime, nor the checkpoint.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from tqexport.artifacts.manifest import FILE_NAME, Artifact, Manifest, enter_artifact, read_manifest
from tqexport.backends import backend_of
from tqexport.backends.base import EXACT, Backend
from tqexport.errors import InputError, about
from tqexport.facts import DAMAGED, ArtifactFacts, Facts, MultiWidthFacts
from tqexport.files import write_bytes
from tqexport.reading.files import read_bytes
from tqexport.versions import versions

__all__ = ["OpenArtifact", "open_artifact", "truncate_file"]


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact that was read, and what it says of itself.

    Attributes:
        name: Its path, or ``the file`` where there is none.
        content: What is in it.
        backend: The back end of its format.
        facts: What it says of itself.
    """

    name: str
    content: bytes
    backend: Backend
    facts: Facts

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that it can be run at or truncated to, ascending."""
        return (self.facts.width,) if isinstance(self.facts, ArtifactFacts) else self.facts.widths

    @property
    def own(self) -> int | None:
        """The width that it computes with; None for a run-time file, which computes with any of its widths."""
        return self.facts.width if isinstance(self.facts, ArtifactFacts) else self.facts.own

    @property
    def holds_several(self) -> bool:
        """Whether other widths can be cut from it."""
        return isinstance(self.facts, MultiWidthFacts)

    def facts_at(self, bits: int) -> ArtifactFacts:
        """What its fixed file of one of its widths says of itself."""
        return self.facts if isinstance(self.facts, ArtifactFacts) else self.facts.by_width[bits]

    def truncate(self, bits: int, *, packed: bool = False) -> bytes:
        """The content of the fixed file of a width, byte-identical to a direct export.

        Args:
            bits: The width.
            packed: Whether its weights are to take fewer bits in the file.

        Raises:
            InputError: It was damaged, holds one width only, or lacks this one.
            UsageError: Files of the format, the kernel or the width cannot be packed.
        """
        with about(self.name):
            self._check_width(bits)
            assert isinstance(self.facts, MultiWidthFacts)  # _check_width
            fixed = self.backend.cut(self.content, bits)
            if hashlib.sha256(fixed).hexdigest() != self.facts.digests.get(bits):
                raise InputError(DAMAGED)
            return self.backend.pack(fixed) if packed else fixed

    def enter(self, folder: Path, file: str, content: bytes) -> bool:
        """Write a fixed file that was cut from it, and enter it into the manifest of the folder, if there is one.

        Args:
            folder: Where it is written.
            file: Its name.
            content: What is in it, see :meth:`truncate`.

        Returns:
            Whether there is a manifest of the checkpoint that the artifact came from; another one is left as it is.

        Raises:
            InputError: The manifest is damaged.
            HostError: The folder cannot be written.
        """
        with about(self.name):
            facts = self.backend.facts(content)
        assert isinstance(facts, ArtifactFacts)  # as truncate makes them
        manifest = read_manifest(folder) if (folder / FILE_NAME).is_file() else None
        entered = manifest is not None and manifest.checkpoint_sha256 == facts.checkpoint_sha256
        entry = Artifact(
            file=file,
            kind=self.backend.name,
            widths=(facts.width,),
            layout=self.backend.layout,
            sha256=hashlib.sha256(content).hexdigest(),
            bytes=len(content),
            inputs=(),
            outputs=(),
            kernel=facts.kernel or EXACT,
            cut_from={"file": Path(self.name).name, "sha256": hashlib.sha256(self.content).hexdigest()},
            versions=versions(()),
        )
        if manifest is None or not entered or manifest.holds(entry):  # of what was exported, nothing new is known
            write_bytes(folder / file, content)
            return entered
        inputs, outputs = self.backend.describe(content)

        def choose(current: Manifest | None) -> Manifest:
            """The manifest of the folder, if it is still of the same checkpoint."""
            if current is None or not current.is_like(manifest):
                raise InputError(f"{folder / FILE_NAME} was changed by another run meanwhile; truncate again")
            return current

        enter_artifact(
            folder,
            replace(entry, inputs=inputs, outputs=outputs),
            {file: content},
            choose,
        )
        return True

    def _check_width(self, bits: int) -> None:
        """Refuse a width that the artifact does not give."""
        if isinstance(self.facts, ArtifactFacts):
            own = f"{self.facts.width} bit{'s' * (self.facts.width != 1)}"
            raise InputError(
                f"holds one width only ({own}), so no other width can be cut from it: each has scales and BatchNorm "
                "values of its own; make one file for all widths with --bits runtime, or an ONNX file that holds the "
                "others with --truncatable"
            )
        if bits not in self.widths:
            raise InputError(f"holds {', '.join(map(str, self.widths))} bits, so it cannot be truncated to {bits}")


def open_artifact(source: Path | bytes) -> OpenArtifact:
    """Read an artifact of tqexport.

    Args:
        source: The file or its content.

    Raises:
        InputError: The file is missing or damaged, or tqexport did not write it.
    """
    name = "the file" if isinstance(source, bytes) else str(source)
    content = source if isinstance(source, bytes) else read_bytes(source)
    with about(name):
        backend = backend_of(content)
        return OpenArtifact(name, content, backend, backend.facts(content))


def truncate_file(source: Path | bytes, bits: int, *, packed: bool = False) -> bytes:
    """Cut an artifact with several widths down to one; see :meth:`OpenArtifact.truncate`.

    Args:
        source: A run-time file written by tqexport (``NAME.onnx`` or ``NAME.tflite``), an ONNX file with the tables of
            other widths (``--truncatable``), or the content of one.
        bits: A width that it holds.
        packed: Whether its weights are to take fewer bits in the file.

    Returns:
        The content of ``NAME-wBITS.onnx`` or ``NAME-wBITS.tflite``.

    Raises:
        InputError: The file is missing, damaged, was changed since its export, holds one width only, or lacks this one.
        UsageError: Files of the format, the kernel or the width cannot be packed.
    """
    return open_artifact(source).truncate(bits, packed=packed)
