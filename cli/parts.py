"""``tqexport split`` and ``tqexport join``."""

from __future__ import annotations

from pathlib import Path

import click

from .common import Output, output_options, write_new
from .truncate import name_of_cut


@click.command("split")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--first", "bits", type=click.IntRange(1, 8), default=2, show_default=True, help="Width of the part that runs."
)
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: beside ARTIFACT."
)
@output_options
def split(artifact: Path, bits: int, folder: Path | None, output: Output) -> None:
    """Split ARTIFACT into a packed file of one width, which runs at once, and the rest.

    ARTIFACT is an ONNX file made with --bits runtime or --truncatable. tqexport join makes it of both again, byte for
    byte. Needs neither the checkpoint nor PyTorch.
    """
    with output.step(f"Splitting {artifact}"):
        from tqexport.artifacts.parts import rest_of
        from tqexport.artifacts.truncate import open_artifact
        from tqexport.files import ensure_folder

        opened = open_artifact(artifact)
        first = opened.truncate(bits, packed=True)
        rest = rest_of(opened, first, bits)
        folder = folder or artifact.parent
        ensure_folder(folder)
    parts = {name_of_cut(artifact, opened, first): first, f"{artifact.stem}-w{bits}-rest.zip": rest}
    for name, content in parts.items():
        write_new(folder / name, content)
        output.say(f"{folder / name}  {len(content):,} bytes")
    together = len(first) + len(rest)
    output.say(f"together {together:,} bytes, {together / len(opened.content):.3f} of {artifact}")
    written = [{"file": str(folder / name), "bytes": len(content)} for name, content in parts.items()]
    output.document({"artifact": str(artifact), "width": bits, "written": written})


@click.command("join")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("rest", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: beside REST."
)
@output_options
def join(first: Path, rest: Path, folder: Path | None, output: Output) -> None:
    """Make of the two files that tqexport split wrote the file that it took, byte for byte.

    Needs neither the checkpoint nor PyTorch.
    """
    with output.step(f"Joining {first} and {rest}"):
        from tqexport.artifacts.parts import joined
        from tqexport.files import ensure_folder

        name, content = joined(first, rest)
        folder = folder or rest.parent
        ensure_folder(folder)
    write_new(folder / name, content)
    output.say(f"{folder / name}  {len(content):,} bytes")
    output.document({"first": str(first), "rest": str(rest), "file": str(folder / name), "bytes": len(content)})
