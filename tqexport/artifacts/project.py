"""A checkpoint and the folder that its exports go to."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqexport.artifacts.manifest import (
    FILE_NAME,
    Artifact,
    Manifest,
    enter_artifact,
    read_artifact,
    read_manifest,
    relative_to,
)
from tqexport.backends import BACKENDS
from tqexport.backends.base import EXACT
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import InputError, UsageError
from tqexport.facts import MultiWidthFacts
from tqexport.files import ensure_folder, sha256_of
from tqexport.integer.names import INTEGER, is_integer
from tqexport.truncation import check_shiftable
from tqexport.versions import versions

if TYPE_CHECKING:
    from tqexport.model import TruncModel

__all__ = ["DEFAULT_FOLDER", "Project", "open_project"]

DEFAULT_FOLDER = Path("tqexport-out")
"""Where exports go that are given no folder."""
DEFAULT_WIDTH = 8

_SUFFIXES = (".tar", ".pth", ".pt", ".ckpt", ".safetensors")  # of checkpoints, taken off in this order

_log = logging.getLogger(__name__)


@dataclass
class Project:
    """A checkpoint and the folder that its exports go to.

    Attributes:
        checkpoint: The checkpoint file.
        folder: Where artifacts and manifest are written.
        options: How the checkpoint is read.
        manifest: What ``folder`` holds of this checkpoint; None if nothing yet.
        source: The export folder that was named, with its manifest, where it is not ``folder``.
        step: Called with a sentence around everything slow, for progress.
    """

    checkpoint: Path
    folder: Path
    options: ReadOptions
    manifest: Manifest | None = None
    source: tuple[Path, Manifest] | None = None
    step: Callable[[str], AbstractContextManager[object]] = nullcontext
    _made: dict[tuple[str, str, int | None, int], bytes] = field(
        default_factory=dict
    )  # fixed files made since the project was opened

    @property
    def name(self) -> str:
        """The checkpoint's name without its extensions, which the artifacts are named after."""
        name = self.checkpoint.name
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        return name or self.checkpoint.name

    @functools.cached_property
    def model(self) -> TruncModel:
        """The reference network, loaded when first asked for."""
        from tqexport.checkpoints.checkpoint import load_checkpoint

        with self.step(f"Reading {self.checkpoint}"):
            model = load_checkpoint(self.checkpoint, self.options)
        if model.info.scheme.quantizer == "dorefa":
            _log.warning(
                "dorefa rounds, so its codes cannot be truncated: each width is quantised anew from the float weights"
            )
        for folder, manifest in self.exports():
            if manifest.checkpoint_sha256 != model.sha256:
                raise InputError(
                    f"{self.checkpoint} has changed since {folder} was exported; run tqexport onnx on it again"
                )
        return model

    @property
    def quantizer(self) -> str:
        """How the network was quantised; without reading it where a manifest says so."""
        return next((m.scheme.quantizer for _, m in self.exports()), None) or self.model.info.scheme.quantizer

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width the checkpoint has; without reading it where a manifest says so."""
        return next((manifest.widths for _, manifest in self.exports()), None) or self.model.info.widths

    def exported_widths(self) -> tuple[int, ...]:
        """The widths of which there is an artifact, or 8 bits where there is none."""
        widths = {bits for _, manifest in self.exports() for artifact in manifest.artifacts for bits in artifact.widths}
        return tuple(sorted(widths)) or (DEFAULT_WIDTH,)

    def export(
        self,
        backend: str,
        widths: Sequence[int],
        kernel: str = EXACT,
        *,
        truncatable: bool = False,
        batch: int | None = None,
    ) -> Iterator[Artifact]:
        """Write the fixed file of each width and enter it into the manifest.

        Args:
            backend: Name of the back end.
            widths: The widths.
            kernel: One of the back end's.
            truncatable: Keep the tables of all other widths in each file, so that they can be cut from it.
            batch: How many samples they take at once; None for as many as files of the format do ordinarily.

        Raises:
            UsageError: The format cannot hold such tables, or not with this kernel.
            InputError: The checkpoint lacks a width, or other widths cannot be cut from its files.
            ConversionError: The network cannot be exported to this format.
            HostError: The folder cannot be written, or a package is missing.
        """
        files = self.make(backend, widths, kernel, batch)
        if truncatable:
            check_shiftable(self.widths, self.quantizer)
            self._check_widths(widths)
            files = BACKENDS[backend].export_truncatable(self, widths, batch)
            if kernel != EXACT:
                raise UsageError(f"only files of --kernel {EXACT} keep tables of other widths; leave --truncatable out")
        ensure_folder(self.folder)
        for bits, content in files:
            others = tuple(other for other in self.widths if other != bits) if truncatable else ()
            yield self._keep(backend, (bits,), content, kernel, batch, others)

    def export_runtime(self, backend: str, kernel: str = EXACT, batch: int | None = None) -> Artifact:
        """Write the one file that holds every width of the checkpoint, and enter it into the manifest.

        Arguments are those of :meth:`export`.

        Raises:
            UsageError: The format has no such file.
            InputError: The codes of the network cannot be shifted, or its widths do not share one graph.
            ConversionError: It cannot be exported to this format.
            HostError: The folder cannot be written, or a package is missing.
        """
        ensure_folder(self.folder)
        check_shiftable(self.widths, self.quantizer)
        BACKENDS[backend].check_environment(kernel)
        self._check_kernel(kernel)
        content = BACKENDS[backend].export_runtime(self, kernel, batch)
        facts = BACKENDS[backend].facts(content)
        widths = facts.widths if isinstance(facts, MultiWidthFacts) else self.widths
        return self._keep(backend, widths, content, kernel, batch)

    def make(
        self, backend: str, widths: Sequence[int], kernel: str = EXACT, batch: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """The fixed file of each width, made from the checkpoint or from files of another back end; not written.

        Arguments are those of :meth:`export`.

        Raises:
            InputError: The checkpoint lacks a width.
            ConversionError: The network cannot be exported to this format.
            HostError: A package is missing.
        """
        batch = batch or BACKENDS[backend].ordinary_batch
        missing = [bits for bits in widths if (backend, kernel, batch, bits) not in self._made]
        if missing:
            BACKENDS[backend].check_environment(kernel)
            self._check_kernel(kernel)
            self._check_widths(missing)
        files = iter(BACKENDS[backend].export(self, missing, kernel, batch) if missing else ())
        for bits in widths:
            content = next(files)[1] if bits in missing else self._made[backend, kernel, batch, bits]
            self._made[backend, kernel, batch, bits] = content
            yield bits, content

    def fixed_files(self, backend: str, widths: Sequence[int], batch: int | None = None) -> Iterator[tuple[int, bytes]]:
        """The fixed file of each width, as it was exported, or made now where it was not."""
        found = {bits: self.find(backend, bits, batch=batch) for bits in widths}
        exported = {bits: content for bits, content in found.items() if content is not None}
        made = dict(self.make(backend, [bits for bits in widths if bits not in exported], batch=batch))
        for bits in widths:
            yield bits, exported[bits] if bits in exported else made[bits]

    def find(self, backend: str, bits: int, kernel: str = EXACT, batch: int | None = None) -> bytes | None:
        """The fixed file of a back end, width, kernel and number of samples at once if it was exported.

        Raises:
            InputError: It is gone or was changed since.
        """
        for folder, manifest in self.exports():
            if artifact := manifest.find(backend, bits, kernel, batch or BACKENDS[backend].ordinary_batch):
                return read_artifact(folder, artifact)
        return None

    def artifacts(self, widths: Collection[int]) -> Iterator[tuple[Artifact, bytes]]:
        """The artifacts that hold some of these widths, with their content.

        Raises:
            InputError: One is gone or was changed since it was exported.
        """
        for folder, manifest in self.exports():
            for artifact in manifest.artifacts:
                if {*widths} & {*artifact.widths}:
                    yield artifact, read_artifact(folder, artifact)

    def exports(self) -> list[tuple[Path, Manifest]]:
        """The folders with exports of this checkpoint, the one that is written to first."""
        own = [(self.folder, self.manifest)] if self.manifest else []
        return own + ([self.source] if self.source else [])

    def file_name(self, backend: str, widths: Sequence[int], kernel: str = EXACT, batch: int | None = None) -> str:
        """What an artifact is called: ``NAME-w4.onnx``, or ``NAME.onnx`` where it holds several widths."""
        return f"{self.name}{BACKENDS[backend].label(widths, kernel, batch)}.{backend}"

    @property
    def default_kernel(self) -> str:
        """``integer`` for a network with grids, else ``exact``; without reading it where the manifest tells."""
        kernels = {artifact.kernel for _, manifest in self.exports() for artifact in manifest.artifacts}
        if kernels:
            return INTEGER if any(map(is_integer, kernels)) else EXACT
        return INTEGER if self.model.info.grids else EXACT

    def _check_kernel(self, kernel: str) -> None:
        """Refuse to leave the grids of a calibrated network out of its files."""
        if not is_integer(kernel) and self.default_kernel == INTEGER:
            raise UsageError(
                f"{self.checkpoint} was calibrated, so that it computes on the grids of integers; export it with "
                f"--kernel integer, or the checkpoint that it was made of with --kernel {kernel}"
            )

    def _check_widths(self, widths: Sequence[int]) -> None:
        """Refuse widths that the checkpoint lacks, without reading it where the manifest has them."""
        for bits in widths:
            if bits not in self.widths:
                self.model.check_width(bits)

    def _keep(
        self,
        backend: str,
        widths: tuple[int, ...],
        content: bytes,
        kernel: str,
        batch: int | None,
        others: tuple[int, ...] = (),
    ) -> Artifact:
        """Write a file from which ``others`` can be cut, and enter it into the manifest."""
        file, sha256 = self.file_name(backend, widths, kernel, batch), hashlib.sha256(content).hexdigest()
        ends, layout = BACKENDS[backend].describe(content), BACKENDS[backend].layout
        companions = BACKENDS[backend].companions(self, file, content)
        digests = {name: hashlib.sha256(beside).hexdigest() for name, beside in companions.items()}
        made_by = versions(BACKENDS[backend].packages)
        artifact = Artifact(
            file,
            backend,
            widths,
            layout,
            sha256,
            len(content),
            *ends,
            kernel,
            others,
            digests,
            versions=made_by,
        )
        own = replace(self.manifest or self._new_manifest(), artifacts=())

        def choose(current: Manifest | None) -> Manifest:
            """Another run may have added to the folder's manifest meanwhile, or begun one of another checkpoint."""
            if current is not None and current.checkpoint != own.checkpoint:
                raise _other_checkpoint(self.folder, current)
            return current if current is not None and current.is_like(own) else own

        self.manifest = enter_artifact(self.folder, artifact, {**companions, file: content}, choose)
        return artifact

    def _new_manifest(self) -> Manifest:
        """A manifest of this checkpoint without an artifact."""
        info = self.model.info
        return Manifest(
            checkpoint=relative_to(self.checkpoint, self.folder),
            checkpoint_sha256=self.model.sha256,
            scheme=info.scheme,
            widths=info.widths,
            input_shape=info.signature[0].shape,
            options=self.options.given(),
        )


def open_project(
    source: Path | None,
    output: Path | None,
    options: ReadOptions,
    step: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Project:
    """Find checkpoint and export folder from what a user named.

    Args:
        source: A checkpoint, an export folder, or None for ``./tqexport-out``.
        output: Where to write; default the export folder named, or ``./tqexport-out``.
        options: How to read the checkpoint; an export folder brings its own.
        step: See :class:`Project`.

    Raises:
        InputError: Nothing is there, or the folder's manifest is damaged.
        UsageError: The output folder holds the exports of another checkpoint.
    """
    source = source or DEFAULT_FOLDER
    if source.is_file():
        folder = output or DEFAULT_FOLDER
        manifest = _manifest_of(folder, source, sha256_of(source), options)
        return Project(source, folder, options, manifest, step=step)
    if not source.is_dir():
        raise InputError(f"{source} does not exist; name a checkpoint file, or an export folder made by tqexport onnx")
    manifest = read_manifest(source)
    recorded = ReadOptions.from_record(manifest.options)
    if replace(options, model=None).given():
        raise UsageError(f"{source} records how its checkpoint is read; give such options with a checkpoint instead")
    if recorded.model != options.model:  # a folder from elsewhere must not choose what is imported
        advice = (
            f"was exported with --model {recorded.model}; if you trust it, add it here too"
            if recorded.model
            else "was exported without --model; leave it out"
        )
        raise UsageError(f"{source} {advice}")
    checkpoint = Path(os.path.relpath(source / manifest.checkpoint))
    if output is None or output.resolve() == source.resolve():
        return Project(checkpoint, source, recorded, manifest, step=step)
    written = _manifest_of(output, checkpoint, manifest.checkpoint_sha256, recorded)
    return Project(checkpoint, output, recorded, written, source=(source, manifest), step=step)


def _manifest_of(folder: Path, checkpoint: Path, sha256: str, options: ReadOptions) -> Manifest | None:
    """The manifest of a folder that may be written to, if it is of the same checkpoint read in the same way."""
    if not (folder / FILE_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    if manifest.checkpoint != relative_to(checkpoint, folder):
        raise _other_checkpoint(folder, manifest)
    if manifest.checkpoint_sha256 == sha256 and dict(manifest.options) == options.given():
        return manifest
    _log.warning("%s holds exports of an earlier %s; they leave its manifest", folder, checkpoint.name)
    return None


def _other_checkpoint(folder: Path, manifest: Manifest) -> UsageError:
    return UsageError(f"{folder} holds exports of {manifest.checkpoint}; choose another folder with --output")
