"""The commands that export, one for each back end: ``tqexport onnx``, ``tqexport tflite``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tqexport.backends.base import EXACT, Backend
from tqexport.checkpoints.options import ReadOptions
from tqexport.extras import needs
from tqexport.integer.names import INTEGER
from tqexport.reading import limits

from .common import Output, Widths, checkpoint_options, output_options, widths_option

__all__ = ["export_command"]


def export_command(backend: Backend) -> click.Command:
    """The command that exports to a back end's format."""

    @needs(backend.extra)
    def command(
        source: Path | None,
        widths: Widths | None,
        folder: Path | None,
        truncatable: bool,
        options: ReadOptions,
        output: Output,
        kernel: str | None = None,
        batch: int | None = None,
    ) -> None:
        """Export as the options say."""
        if truncatable and widths is not None and widths.run_time:
            raise click.UsageError("A file made with --bits runtime can always be truncated; leave --truncatable out.")
        with output.step("Starting"):
            from tqexport.artifacts.project import open_project

            project = open_project(source, folder, options, output.step)
        if kernel is None:
            kernel = project.default_kernel
            kernel = kernel if kernel in backend.kernels else next(iter(backend.kernels))
        if widths is not None and widths.run_time:
            exported = iter([project.export_runtime(backend.name, kernel, batch)])
        else:
            asked = widths.resolve(project.widths) if widths else project.exported_widths()
            exported = project.export(backend.name, asked, kernel, truncatable=truncatable, batch=batch)
        artifacts = []
        for artifact in exported:
            others = ", ".join(map(str, artifact.truncatable_to))
            truncatable_to = f", can be truncated to {others}" if others else ""
            path = project.folder / artifact.file
            output.say(f"{path}  {artifact.bytes:,} bytes, {artifact.layout}{truncatable_to}")
            output.say(*(str(project.folder / name) for name in artifact.companions))
            artifacts.append(artifact)
        output.document({"folder": str(project.folder), "artifacts": [asdict(artifact) for artifact in artifacts]})

    for option in reversed(_options(backend)):
        command = option(command)
    return click.command(backend.name, help=_help(backend))(command)


def _options(backend: Backend) -> list[Callable[[Any], Any]]:
    """What the command takes."""
    metavar = None if backend.takes_folder else "CHECKPOINT"
    options = [
        click.argument("source", metavar=metavar, type=click.Path(path_type=Path), required=not backend.takes_folder),
        widths_option("the widths exported", run_time=True)
        if backend.takes_folder
        else widths_option("8", "8", run_time=True),
        click.option(
            "-o",
            "--output",
            "folder",
            type=click.Path(path_type=Path, file_okay=False),
            help=f"Default: {'the export folder' if backend.takes_folder else './tqexport-out'}.",
        ),
    ]
    if len(backend.kernels) > 1:
        help_text = " ".join(f"{kernel}: {text}." for kernel, text in backend.kernels.items())
        options.append(
            click.option(
                "--kernel",
                type=click.Choice(list(backend.kernels)),
                help=f"{help_text} Default: {INTEGER} for a checkpoint with grids, else {EXACT}.",
            )
        )
    if backend.fixes_batch:
        ordinary = backend.ordinary_batch or "any number"
        help_text = f"Samples that a file takes at once, by default {ordinary}; another N is in its name."
        options.append(click.option("--batch", type=click.IntRange(1, limits.BATCH), metavar="N", help=help_text))
    truncatable = "Keep the tables of all other widths in each file, so that tqexport truncate can make their files."
    hidden = type(backend).export_truncatable is Backend.export_truncatable  # then it says what to do instead
    options.append(click.option("--truncatable", is_flag=True, help=truncatable, hidden=hidden))
    return [*options, checkpoint_options, output_options]


def _help(backend: Backend) -> str:
    """The command's help."""
    if not backend.takes_folder:
        return f"Export CHECKPOINT to {backend.title}.\n\n{backend.description}"
    sources = "SOURCE is an export folder (default ./tqexport-out) or a checkpoint."
    return f"Export to {backend.title}.\n\n{sources} {backend.description}"
