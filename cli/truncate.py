"""``tqexport truncate``."""

from __future__ import annotations

from pathlib import Path

import click

from .common import Output, Widths, output_options, widths_option


@click.command("truncate")
@click.argument("artifact", type=click.Path(path_type=Path))
@widths_option("all that ARTIFACT holds", default="all")
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: beside ARTIFACT."
)
@output_options
def command(artifact: Path, widths: Widths, folder: Path | None, as_json: bool, verbose: bool) -> None:
    """Cut ARTIFACT, a file made with --bits runtime, to files of one width each.

    Needs neither the checkpoint nor PyTorch. The files are, byte for byte, those that a direct export gives.
    """
    output = Output(as_json=as_json, verbose=verbose)
    with output.step(f"Reading {artifact}"):
        from tqexport.files import ensure_folder, write_bytes
        from tqexport.truncate import artifact_widths, truncate_file

        available, _ = artifact_widths(artifact)
        folder = folder or artifact.parent
        ensure_folder(folder)
    written = []
    for bits in widths.resolve(available):
        content = truncate_file(artifact, bits)
        target = folder / f"{artifact.stem}-w{bits}{artifact.suffix}"
        write_bytes(target, content)
        output.say(f"{target}  {len(content):,} bytes")
        written.append({"file": str(target), "width": bits, "bytes": len(content)})
    output.document({"artifact": str(artifact), "written": written})
