"""What reading an exported file comes to, whatever its format."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from random import Random

from harness import ROOT, Reader

from tqexport import TruncModel, load_checkpoint
from tqexport.artifacts.truncate import OpenArtifact, open_artifact
from tqexport.backends.apart import BackendApart
from tqexport.errors import InputError, UsageError
from tqexport.integer.names import is_integer
from tqexport.reading.apart import Apart
from tqexport.verification.pair import ArtifactAtWidth, samples_for

__all__ = ["ArtifactReader"]


class ArtifactReader(Reader):
    """A format: what ``inspect``, ``truncate`` and ``verify`` read of a file."""

    suffix: str

    def __init__(self) -> None:
        self._apart = Apart()

    @abstractmethod
    def corpus(self) -> list[bytes]:
        """Right files."""

    @abstractmethod
    def mutated(self, content: bytes, random: Random) -> bytes:
        """A hostile one."""

    @cached_property
    def files(self) -> list[bytes]:
        """Right files, made once."""
        return self.corpus()

    @cached_property
    def integers(self) -> TruncModel:
        """A network of integers."""
        return load_checkpoint(ROOT / "fixtures/digits-resnet8-int.pt")

    def _cut(self, artifact: OpenArtifact, width: int) -> None:
        """Cut, pack and split as if the hash in the file were right, which who makes the file writes there."""
        try:
            first = artifact.backend.cut(artifact.content, width)
            artifact.backend.facts(first)
            packed = artifact.backend.pack(first)
            artifact.backend.rejoined(packed, artifact.backend.remainder(artifact.content, packed, width), width)
        except (InputError, UsageError):
            return

    def write(self, folder: Path, random: Random) -> Path:
        self._right = random.choice(self.files)
        path = folder / f"net.{self.suffix}"
        path.write_bytes(self.mutated(self._right, random))
        return path

    def read(self, path: Path) -> None:
        artifact = open_artifact(path)
        bits = artifact.own or artifact.widths[-1]
        artifact.backend.describe(artifact.content)
        artifact.backend.codes(artifact.content, bits)
        for width in artifact.widths[:1] if artifact.holds_several and artifact.backend.cuts else ():
            try:
                artifact.truncate(width)
            except InputError:  # most changes show here; what else is read is read all the same
                self._cut(artifact, width)
        if is_integer(artifact.facts_at(bits).kernel):
            return
        chosen = bits if artifact.own is None else None
        artifact.backend.compare_parameters(artifact.content, self._right, bits, switched=chosen is not None)
        opener = BackendApart(self._apart, artifact.backend.name)
        samples = samples_for(ArtifactAtWidth(artifact, bits), None, 2).inputs
        runner = opener.open_runner(artifact.content, chosen)
        if runner is not None:
            run = runner.run(samples)
            stretches = opener.open_stretches(artifact.content, chosen, list(run.activations))
            if stretches is not None:
                stretches(samples, run.activations)
        continuous = opener.open_continuous(artifact.content, chosen)
        if continuous is not None:
            continuous(samples)
