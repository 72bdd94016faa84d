"""``tqexport tflite``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from tqexport.artifacts.manifest import Kernel
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


@click.command("tflite")
@click.argument("source", type=click.Path(path_type=Path), required=False)
@widths_option("the widths exported to ONNX", run_time=True)
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: the export folder."
)
@click.option(
    "--kernel",
    type=click.Choice(["exact", "dynamic"]),
    default="exact",
    show_default=True,
    help="exact: float kernels over the trained weights. dynamic: integer kernels, faster, which round their input.",
)
@click.option(
    "--truncatable",
    is_flag=True,
    help="Keep the tables of all narrower widths in each file, so that tqexport truncate can make their files from it. "
    "A TFLite file of B bits stores the upper B bits of the codes, so wider files cannot be made from it.",
)
@checkpoint_options
@output_options
def command(
    source: Path | None,
    widths: Widths | None,
    folder: Path | None,
    kernel: Kernel,
    truncatable: bool,
    options: ReadOptions,
    as_json: bool,
    verbose: bool,
) -> None:
    """Convert to TFLite with one byte per quantised weight.

    SOURCE is an export folder (default ./tqexport-out) or a checkpoint. Writes NAME-wB.tflite for each width B.
    With --bits runtime it writes one NAME.tflite, with a signature for each width (w1 to w8) over one copy of the
    codes. Inputs are channels last (NHWC), as TFLite has them, one sample at a time.
    """
    switched = widths is not None and widths.run_time
    if truncatable and switched:
        raise click.UsageError(RUN_TIME_IS_TRUNCATABLE)
    output = Output(as_json=as_json, verbose=verbose)
    with output.step("Starting"):
        from tqexport.artifacts.project import open_project

        project = open_project(source, folder, options, output.step)
    asked = widths.resolve(project.widths) if widths else project.exported_widths()
    artifacts = []
    exported = (
        [project.export_run_time_tflite(kernel)]
        if switched
        else project.export_tflite(asked, kernel, truncatable=truncatable)
    )
    for artifact in exported:
        say_artifact(output, project.folder, artifact)
        artifacts.append(artifact)
    output.document({"folder": str(project.folder), "artifacts": [asdict(artifact) for artifact in artifacts]})
