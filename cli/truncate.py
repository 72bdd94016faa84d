"""``tqexport truncate``."""

from __future__ import annotations

from pathlib import Path

import click

from tqexport.backends.base import EXACT

from .common import Output, Widths, output_options, widths_option


@click.command("truncate")
@click.argument("artifact", type=click.Path(path_type=Path))
@widths_option("all that can be cut from ARTIFACT", default="all")
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: beside ARTIFACT."
)
@output_options
def command(artifact: Path, widths: Widths, folder: Path | None, output: Output) -> None:
    """Cut ARTIFACT to files of one width each.

    ARTIFACT was made with --bits runtime, or is an ONNX file made with --truncatable. Needs neither the checkpoint nor
    PyTorch. The files are, byte for byte, those that a direct export without --truncatable gives. In an export folder
    of the same checkpoint they are entered into the manifest, with what they were cut from.
    """
    with output.step(f"Reading {artifact}"):
        from tqexport.artifacts.manifest import FILE_NAME
        from tqexport.artifacts.truncate import open_artifact
        from tqexport.errors import UsageError
        from tqexport.files import ensure_folder

        opened = open_artifact(artifact)
        folder = folder or artifact.parent
        ensure_folder(folder)
    written = []
    for bits in widths.resolve([bits for bits in opened.widths if bits != opened.own] or opened.widths):
        content = opened.truncate(bits)
        target = folder / _name(artifact, opened.own, opened.facts_at(bits).kernel, bits)
        if target.is_file() and target.read_bytes() != content:
            raise UsageError(f"{target} is another file already; name another folder with --output, or remove it")
        entered = opened.enter(folder, target.name, content)
        output.say(f"{target}  {len(content):,} bytes")
        written.append({"file": str(target), "width": bits, "bytes": len(content), "entered": entered})
    if (manifest := folder / FILE_NAME).is_file() and not all(entry["entered"] for entry in written):
        output.say(f"not entered in {manifest}, which is of another checkpoint")
    output.document({"artifact": str(artifact), "written": written})


def _name(artifact: Path, own: int | None, kernel: str | None, bits: int) -> str:
    """What a direct export of the width is called: ``NAME-w4.onnx``, ``NAME-w4-dynamic.tflite``."""
    suffix = "" if kernel in (None, EXACT) else f"-{kernel}"
    stem = artifact.stem.removesuffix(suffix).removesuffix(f"-w{own}")
    return f"{stem}-w{bits}{suffix}{artifact.suffix}"
