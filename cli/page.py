"""``tqexport page``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from tqexport.checkpoints.options import ReadOptions
from tqexport.extras import needs

from .common import Output, checkpoint_options, output_options


@click.command("page")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default="page",
    show_default=True,
    help="Folder of the page.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Samples to choose from: an NPZ file with inputs (N, ...), before normalisation, and, optionally, labels (N); "
    "or a folder with a folder of pictures per class.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="How many of --data the page gets, from all over the file. Default: 200, fewer where they take over 16 MB.",
)
@click.option(
    "--onnxruntime-web",
    "copy",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A folder with a copy of onnxruntime-web. Default: the one that npm fetched before, or fetches now.",
)
@checkpoint_options
@output_options
@needs("onnx")
def command(
    source: Path | None,
    folder: Path,
    data: Path | None,
    samples: int | None,
    copy: Path | None,
    options: ReadOptions,
    output: Output,
) -> None:
    """Write a folder that runs the network in a browser, at every width.

    SOURCE is an export folder (default ./tqexport-out) or a checkpoint. On the page one draws, drops a picture or
    chooses a sample, moves a slider through the widths, and sees prediction, time and bytes of each, and how often it
    agrees with the widest. The integer form is shown where the checkpoint has grids. Any web server gives the folder
    out; it holds onnxruntime-web and needs no network.
    """
    with output.step("Starting"):
        from tqexport.artifacts.project import open_project
        from tqexport.backends.onnx.web_package import find_package
        from tqexport.page.build import build_page, check_page, write_page
        from tqexport.verification.samples import read_samples

        project = open_project(source, None, options, output.step)
        check_page(folder, project, sampled=data is not None)
    with output.step("Looking for onnxruntime-web"):
        package = find_package(copy)
    info = project.model.info
    chosen = read_samples(data, info.signature, info.class_names) if data else None
    page = build_page(project, chosen, package, samples)
    with output.step(f"Writing {folder}"):
        write_page(folder, page)
    total = sum(map(len, page.files.values()))
    count = (page.facts["samples"] or {"count": 0})["count"]
    output.say(
        f"{folder}  {len(page.files)} files, {total:,} bytes, of which onnxruntime-web {package.version} is most"
    )
    for model in page.facts["models"]:
        held = ", ".join(map(str, model["widths"]))
        output.say(f"{folder / model['file']}  {model['bytes']:,} bytes, {held} bits")
    output.say(f"to look at it: python3 -m http.server --directory {folder}, and open http://localhost:8000/")
    output.document(
        {
            "folder": str(folder),
            "kernel": page.facts["kernel"],
            "widths": page.facts["widths"],
            "samples": count,
            "onnxruntime_web": package.version,
            "files": [
                {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in sorted(page.files.items())
            ],
        }
    )
