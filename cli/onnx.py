"""``tqexport onnx``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from tqexport.checkpoints.options import ReadOptions

from .common import (
    RUN_TIME_IS_TRUNCATABLE,
    Output,
    Widths,
    checkpoint_options,
    output_options,
    say_artifact,
    widths_option,
)


@click.command("onnx")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@widths_option("8", default="8", run_time=True)
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: ./tqexport-out."
)
@click.option(
    "--truncatable",
    is_flag=True,
    help="Keep the tables of all other widths in each file, so that tqexport truncate can make their files from it.",
)
@checkpoint_options
@output_options
def command(
    checkpoint: Path,
    widths: Widths,
    folder: Path | None,
    truncatable: bool,
    options: ReadOptions,
    as_json: bool,
    verbose: bool,
) -> None:
    """Export CHECKPOINT to ONNX with 8-bit codes and a BitShift node.

    Writes NAME-wB.onnx for each width B, and the manifest tqexport.json. With --bits runtime it writes one NAME.onnx,
    whose second input, bits, chooses the width as it runs.
    """
    if truncatable and widths.run_time:
        raise click.UsageError(RUN_TIME_IS_TRUNCATABLE)
    output = Output(as_json=as_json, verbose=verbose)
    with output.step("Starting"):
        from tqexport.artifacts.project import open_project

        project = open_project(checkpoint, folder, options, output.step)
    artifacts = []
    exported = (
        [project.export_run_time_onnx()]
        if widths.run_time
        else project.export_onnx(widths.resolve(project.widths), truncatable=truncatable)
    )
    for artifact in exported:
        say_artifact(output, project.folder, artifact)
        artifacts.append(artifact)
    output.document({"folder": str(project.folder), "artifacts": [asdict(artifact) for artifact in artifacts]})
