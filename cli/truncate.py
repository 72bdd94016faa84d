"""``tqexport truncate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tqexport.facts import MultiWidthFacts

from .common import Output, Widths, check_new, output_options, widths_option

if TYPE_CHECKING:
    from tqexport.artifacts.truncate import OpenArtifact


__all__ = ["command", "name_of_cut"]


@click.command("truncate")
@click.argument("artifact", type=click.Path(path_type=Path))
@widths_option("all that can be cut from ARTIFACT", default="all")
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: beside ARTIFACT."
)
@click.option("--packed", is_flag=True, help="Put several codes of 1 to 4 bits in a byte (--kernel exact-packed).")
@output_options
def command(artifact: Path, widths: Widths, folder: Path | None, packed: bool, output: Output) -> None:
    """Cut ARTIFACT to files of one width each.

    ARTIFACT was made with --bits runtime, or is an ONNX file made with --truncatable. Needs neither the checkpoint nor
    PyTorch. The files are, byte for byte, those that a direct export without --truncatable gives. In an export folder
    of the same checkpoint they are entered into the manifest, with what they were cut from.
    """
    with output.step(f"Reading {artifact}"):
        from tqexport.artifacts.manifest import FILE_NAME
        from tqexport.artifacts.truncate import open_artifact
        from tqexport.files import ensure_folder

        opened = open_artifact(artifact)
        folder = folder or artifact.parent
        ensure_folder(folder)
    written = []
    others = [bits for bits in opened.widths if bits != opened.own] or opened.widths
    if packed:
        others = [bits for bits in opened.widths if bits in opened.backend.packed_widths] or others
    for bits in widths.resolve(others):
        content = opened.truncate(bits, packed=packed)
        target = folder / name_of_cut(artifact, opened, content)
        check_new(target, content)
        entered = opened.enter(folder, target.name, content)
        output.say(f"{target}  {len(content):,} bytes")
        written.append({"file": str(target), "width": bits, "bytes": len(content), "entered": entered})
    if (manifest := folder / FILE_NAME).is_file() and not all(entry["entered"] for entry in written):
        output.say(f"not entered in {manifest}, which is of another checkpoint")
    output.document({"artifact": str(artifact), "written": written})


def name_of_cut(artifact: Path, opened: OpenArtifact, content: bytes) -> str:
    """What a direct export of a file of one width is called: ``NAME-w4.onnx``, ``NAME-w4-dynamic.tflite``."""
    cut = opened.backend.facts(content)
    assert not isinstance(cut, MultiWidthFacts)  # nothing is cut to several widths
    batch = opened.backend.batch(content)
    widths = opened.widths if opened.own is None else (opened.own,)
    before = opened.backend.label(widths, opened.facts_at(cut.width).kernel, batch)
    after = opened.backend.label((cut.width,), cut.kernel, batch)
    return f"{artifact.stem.removesuffix(before)}{after}{artifact.suffix}"
