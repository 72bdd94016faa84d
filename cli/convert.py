"""``tqexport convert``."""

from __future__ import annotations

from pathlib import Path

import click

from tqexport.checkpoints.options import ReadOptions

from .common import Output, checkpoint_options, output_options


@click.command("convert")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@checkpoint_options
@output_options
def command(checkpoint: Path, target: Path, options: ReadOptions, output: Output) -> None:
    """Write CHECKPOINT as a native one, TARGET, which says for itself how it was trained.

    NAME.safetensors becomes a file without pickle that holds the codes too; every other name a PyTorch file.
    """
    with output.step(f"Reading {checkpoint}"):
        from tqexport.checkpoints.checkpoint import load_checkpoint, save_checkpoint
        from tqexport.errors import UsageError
        from tqexport.files import ensure_folder

        if target.exists() and checkpoint.exists() and target.samefile(checkpoint):
            raise UsageError(f"{target} is the checkpoint itself; name another file to write")
        model = load_checkpoint(checkpoint, options)
        ensure_folder(target.parent)
        save_checkpoint(target, model.module, model.info)
    output.say(f"{target}  {target.stat().st_size:,} bytes, {model.info.architecture}")
    output.document({"checkpoint": str(checkpoint), "target": str(target), "bytes": target.stat().st_size})
