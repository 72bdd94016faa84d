"""From one artifact with several widths to the fixed file of one width, without the network it came from.

Run-time files hold several widths, and so do ONNX files that were exported with ``--truncatable``. The result is, byte
for byte, what exporting the checkpoint at that width gives (without ``--truncatable``); the artifact carries the hash
of each fixed file, so a result that differs is never handed out. Needs what the format's files need (onnx, or
flatbuffers) and numpy: neither torch, nor TensorFlow, nor a runtime, nor the checkpoint.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tqexport.backends import backend_of
from tqexport.backends.base import Backend
from tqexport.errors import InputError, about
from tqexport.facts import DAMAGED, ArtifactFacts, Facts, MultiWidthFacts
from tqexport.reading.files import read_bytes

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

    def truncate(self, bits: int) -> bytes:
        """The content of the fixed file of a width, byte-identical to a direct export.

        Raises:
            InputError: It was damaged, holds one width only, or lacks this one.
        """
        with about(self.name):
            self._check_width(bits)
            assert isinstance(self.facts, MultiWidthFacts)  # _check_width
            fixed = self.backend.cut(self.content, bits)
            if hashlib.sha256(fixed).hexdigest() != self.facts.digests.get(bits):
                raise InputError(DAMAGED)
        return fixed

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


def truncate_file(source: Path | bytes, bits: int) -> bytes:
    """Cut an artifact with several widths down to one; see :meth:`OpenArtifact.truncate`.

    Args:
        source: A run-time file written by tqexport (``NAME.onnx`` or ``NAME.tflite``), an ONNX file with the tables of
            other widths (``--truncatable``), or the content of one.
        bits: A width that it holds.

    Returns:
        The content of ``NAME-wBITS.onnx`` or ``NAME-wBITS.tflite``.

    Raises:
        InputError: The file is missing, damaged, was changed since its export, holds one width only, or lacks this one.
    """
    return open_artifact(source).truncate(bits)
