"""An export folder at work: where the checkpoint is, what was exported, and how more of it comes in."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqexport.artifacts.manifest import (
    FILE_NAME,
    Artifact,
    Kernel,
    Kind,
    Manifest,
    TensorInfo,
    check_artifact,
    read_manifest,
    relative_to,
)
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import HostError, InputError, UsageError
from tqexport.files import ensure_folder, sha256_of, write_bytes

if TYPE_CHECKING:
    import onnx

    from tqexport.model import TruncModel

__all__ = ["DEFAULT_FOLDER", "Project", "check_converter", "open_project"]

DEFAULT_FOLDER = Path("tqexport-out")
DEFAULT_WIDTH = 8

Step = Callable[[str], AbstractContextManager[object]]

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
    step: Step = lambda text: nullcontext(text)
    _exported: dict[int, bytes] = field(default_factory=dict)  # ONNX files made since the project was opened

    @property
    def name(self) -> str:
        """The checkpoint's name without its extensions, which the artifacts are named after."""
        name = self.checkpoint.name
        for suffix in (".tar", ".pth", ".pt", ".ckpt"):
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
        for folder, manifest in self._exports():
            if manifest.checkpoint_sha256 != model.sha256:
                raise InputError(
                    f"{self.checkpoint} has changed since {folder} was exported; run tqexport onnx on it again"
                )
        return model

    @property
    def quantizer(self) -> str:
        """How the network was quantised."""
        return next((manifest.quantizer for _, manifest in self._exports()), None) or self.model.info.scheme.quantizer

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width the checkpoint has; without reading it where the manifest says so."""
        return next((manifest.widths for _, manifest in self._exports()), None) or self.model.info.widths

    def exported_widths(self) -> tuple[int, ...]:
        """The widths of which there is an artifact, or 8 bits where there is none."""
        found = {bits for _, manifest in self._exports() for a in manifest.artifacts for bits in a.widths}
        return tuple(sorted(found)) or (DEFAULT_WIDTH,)

    def export_onnx(self, widths: Sequence[int], *, truncatable: bool = False) -> Iterator[Artifact]:
        """Write ``NAME-wB.onnx`` for each width and enter it into the manifest.

        Args:
            widths: The widths.
            truncatable: Keep the tables of all other widths in each file, so that they can be cut from it.

        Raises:
            InputError: The checkpoint lacks a width, or other widths cannot be cut from its files.
            HostError: The folder cannot be written.
        """
        ensure_folder(self.folder)
        files = self.onnx_bytes(widths)
        if truncatable:
            from tqexport.backends.onnx.truncatable import truncatable_onnx

            self._check_truncatable(widths)
            files = truncatable_onnx(self.onnx_bytes(self.widths), widths)
        for bits, content in files:
            others = tuple(other for other in self.widths if other != bits) if truncatable else ()
            artifact = self._artifact("onnx", (bits,), content)
            yield self._keep(replace(artifact, truncatable_to=others), content)

    def onnx_bytes(self, widths: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Each width with its ONNX file, from the checkpoint."""
        if missing := tuple(bits for bits in widths if bits not in self._exported):
            from tqexport.backends.onnx.export import export_onnx

            for bits in missing:
                self.model.check_width(bits)
            exports = export_onnx(self.model, missing)
        for bits in widths:
            if bits not in self._exported:
                with self.step(f"Exporting {bits} bits to ONNX"):
                    self._exported.update([next(exports)])
            yield bits, self._exported[bits]

    def export_tflite(
        self, widths: Sequence[int], kernel: Kernel = "exact", *, truncatable: bool = False
    ) -> Iterator[Artifact]:
        """Write ``NAME-wB.tflite`` (``NAME-wB-dynamic.tflite``) for each width and enter it into the manifest.

        The ONNX files of the folder are converted; widths without one are exported on the way.

        Args:
            widths: The widths.
            kernel: See :func:`tqexport.backends.tflite.codes.put_codes_back`.
            truncatable: Keep the tables of all narrower widths in each file, so that they can be cut from it.

        Raises:
            InputError: The checkpoint lacks a width, an ONNX file was changed, or other widths cannot be cut from the
                files.
            ConversionError: The network cannot be converted.
            HostError: The folder cannot be written.
        """
        ensure_folder(self.folder)
        if truncatable:
            self._check_truncatable(widths)
        for bits, content in (self._truncatable_tflite if truncatable else self.tflite_bytes)(widths, kernel):
            narrower = tuple(other for other in self.widths if other < bits) if truncatable else ()
            if truncatable and not narrower:
                _log.warning("nothing can be cut from the TFLite file of the narrowest width, %d", bits)
            artifact = self._artifact("tflite", (bits,), content, kernel)
            yield self._keep(replace(artifact, truncatable_to=narrower), content)

    def export_run_time_onnx(self) -> Artifact:
        """Write ``NAME.onnx``, which holds every width of the checkpoint, and enter it into the manifest.

        Raises:
            InputError: The network cannot switch its width.
            HostError: The folder cannot be written.
        """
        from tqexport.backends.onnx.runtime_file import check_switchable, merge_onnx

        ensure_folder(self.folder)
        check_switchable(self.widths, self.quantizer)
        content = merge_onnx(self.onnx_bytes(self.widths))
        return self._keep(self._artifact("onnx", self.widths, content), content)

    def export_run_time_tflite(self, kernel: Kernel = "exact") -> Artifact:
        """Write ``NAME.tflite``, which has a signature for every width, and enter it into the manifest.

        Raises:
            InputError: The network cannot switch its width.
            ConversionError: It cannot be converted.
            HostError: The folder cannot be written.
        """
        from tqexport.backends.onnx.runtime_file import check_switchable
        from tqexport.backends.tflite.runtime_file import convert_to_switchable_tflite

        ensure_folder(self.folder)
        check_switchable(self.widths, self.quantizer)
        check_converter()
        models = self._onnx_models(self.widths)
        with self.step(f"Converting {len(models)} widths to one TFLite file"):
            content, _ = convert_to_switchable_tflite(models, kernel)
        return self._keep(self._artifact("tflite", self.widths, content, kernel), content)

    def tflite_bytes(self, widths: Sequence[int], kernel: Kernel = "exact") -> Iterator[tuple[int, bytes]]:
        """Each width with its TFLite file, converted from the ONNX file of the folder or of the checkpoint."""
        from tqexport.backends.tflite.export import convert_to_tflite

        check_converter()
        models = self._onnx_models(widths)
        with self.step(f"Converting {len(models)} file{'s' * (len(models) > 1)} to TFLite"):
            converted = convert_to_tflite(models, kernel)
        yield from zip(widths, converted, strict=True)

    def _truncatable_tflite(self, widths: Sequence[int], kernel: Kernel) -> Iterator[tuple[int, bytes]]:
        """Each width with its TFLite file, which has the tables of all narrower ones."""
        from tqexport.backends.tflite.export import run_once
        from tqexport.backends.tflite.runtime_file import merge_tflite
        from tqexport.backends.tflite.truncatable import truncatable_tflite

        needed = tuple(bits for bits in self.widths if bits <= max(widths))
        if len(needed) == 1:
            yield from self.tflite_bytes(widths, kernel)
            return
        models = self._onnx_models(needed)
        with self.step(f"Converting {len(models)} widths to TFLite"):
            files = truncatable_tflite(*merge_tflite(models, kernel), widths)
            for content in files.values():
                run_once(content)
        yield from files.items()

    def _check_truncatable(self, widths: Sequence[int]) -> None:
        from tqexport.backends.onnx.runtime_file import check_switchable

        check_switchable(self.widths, self.quantizer)
        for bits in widths:
            if bits not in self.widths:
                self.model.check_width(bits)

    def _onnx_models(self, widths: Sequence[int]) -> list[onnx.ModelProto]:
        """The ONNX model of each width, from the folder or the checkpoint."""
        import onnx

        models: dict[int, onnx.ModelProto] = {}
        for bits in widths:
            if path := self.find("onnx", bits):
                from tqexport.backends.onnx.file import read_onnx
                from tqexport.backends.onnx.truncatable import without_tables

                models[bits] = without_tables(read_onnx(path))
        for bits, content in self.onnx_bytes([bits for bits in widths if bits not in models]):
            models[bits] = onnx.load_from_string(content)
        return [models[bits] for bits in widths]

    def find(self, kind: Kind, bits: int, kernel: Kernel = "exact") -> Path | None:
        """The file of a kind, width and kernel if it was exported.

        Raises:
            InputError: It is gone or was changed since.
        """
        for folder, manifest in self._exports():
            if artifact := manifest.find(kind, bits, kernel):
                return check_artifact(folder, artifact)
        return None

    def check_files(self, widths: Sequence[int]) -> None:
        """Make sure that the artifacts of some widths are as they were exported.

        Raises:
            InputError: One is gone or was changed since.
        """
        for folder, manifest in self._exports():
            for artifact in manifest.artifacts:
                if set(artifact.widths) & set(widths):
                    check_artifact(folder, artifact)

    def run_time_files(self) -> list[tuple[Artifact, Path]]:
        """The artifacts that hold several widths.

        Raises:
            InputError: One is gone or was changed since.
        """
        return [
            (artifact, check_artifact(folder, artifact))
            for folder, manifest in self._exports()
            for artifact in manifest.run_time()
        ]

    def _exports(self) -> list[tuple[Path, Manifest]]:
        """The folders with exports of this checkpoint, the one that is written to first."""
        own = [(self.folder, self.manifest)] if self.manifest else []
        return own + ([self.source] if self.source else [])

    def _artifact(self, kind: Kind, widths: tuple[int, ...], content: bytes, kernel: Kernel = "exact") -> Artifact:
        import hashlib

        describe = _describe_onnx if kind == "onnx" else _describe_tflite
        inputs, outputs = describe(content)
        layout = "channels first" if kind == "onnx" else "channels last"
        file = self.file_name(kind, widths, kernel)
        sha256 = hashlib.sha256(content).hexdigest()
        return Artifact(file, kind, widths, layout, sha256, len(content), inputs, outputs, kernel)

    def file_name(self, kind: Kind, widths: tuple[int, ...], kernel: Kernel = "exact") -> str:
        """What an artifact is called: ``NAME-w4.onnx``, or ``NAME.onnx`` where it holds several widths."""
        width = f"-w{widths[0]}" if len(widths) == 1 else ""
        return f"{self.name}{width}{'' if kernel == 'exact' else f'-{kernel}'}.{kind}"

    def _keep(self, artifact: Artifact, content: bytes) -> Artifact:
        write_bytes(self.folder / artifact.file, content)
        self.manifest = (self.manifest or self._new_manifest()).with_artifacts([artifact])
        self.manifest.write(self.folder)
        return artifact

    def _new_manifest(self) -> Manifest:
        info = self.model.info
        return Manifest(
            checkpoint=relative_to(self.checkpoint, self.folder),
            checkpoint_sha256=self.model.sha256,
            quantizer=info.scheme.quantizer,
            power_of_two_scale=info.scheme.power_of_two_scale,
            widths=info.widths,
            input_shape=info.input_shape,
            options=self.options.given(),
        )


def open_project(source: Path | None, output: Path | None, options: ReadOptions, step: Step | None = None) -> Project:
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
    step = step or (lambda text: nullcontext(text))
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
        said = (
            f"was exported with --model {recorded.model}; if you trust it, add it here too"
            if recorded.model
            else ("was exported without --model; leave it out")
        )
        raise UsageError(f"{source} {said}")
    options = recorded
    checkpoint = Path(os.path.relpath(source / manifest.checkpoint))
    if output is None or output.resolve() == source.resolve():
        return Project(checkpoint, source, options, manifest, step=step)
    there = _manifest_of(output, checkpoint, manifest.checkpoint_sha256, options)
    return Project(checkpoint, output, options, there, source=(source, manifest), step=step)


def check_converter() -> None:
    """Make sure that what converts to TFLite is there, before any slow work; it runs in a process of its own.

    Raises:
        HostError: A package is missing.
    """
    for package in ("onnx2tf", "tensorflow", "tf_keras"):
        try:
            found = importlib.util.find_spec(package) is not None
        except ValueError:  # somebody put None in the place of the module
            found = False
        if not found:
            raise HostError(f"conversion to TFLite needs {package}, which is not installed: pip install {package}")


def _manifest_of(folder: Path, checkpoint: Path, sha256: str, options: ReadOptions) -> Manifest | None:
    """The manifest of a folder that may be written to, if it is of the same checkpoint read in the same way."""
    if not (folder / FILE_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    if manifest.checkpoint != relative_to(checkpoint, folder):
        raise UsageError(f"{folder} holds exports of {manifest.checkpoint}; choose another folder with --output")
    if manifest.checkpoint_sha256 == sha256 and dict(manifest.options) == options.given():
        return manifest
    _log.warning("%s holds exports of an earlier %s; they leave its manifest", folder, checkpoint.name)
    return None


def _describe_onnx(content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    import onnx

    def info(value: onnx.ValueInfoProto) -> TensorInfo:
        tensor = value.type.tensor_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return TensorInfo(value.name, dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim))

    graph = onnx.load_from_string(content).graph
    return tuple(map(info, graph.input)), tuple(map(info, graph.output))


def _describe_tflite(content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    from tqexport.backends.tflite.session import open_interpreter

    interpreter = open_interpreter(content)

    def info(detail: dict[str, object]) -> TensorInfo:
        signature = detail["shape_signature"]
        shape = tuple("batch" if n < 0 else int(n) for n in signature)  # type: ignore[attr-defined]
        return TensorInfo(str(detail["name"]), detail["dtype"].__name__, shape)  # type: ignore[attr-defined]

    return tuple(map(info, interpreter.get_input_details())), tuple(map(info, interpreter.get_output_details()))
