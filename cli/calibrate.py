"""``tqexport calibrate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tqexport.checkpoints.options import ReadOptions

from .common import Output, checkpoint_options, output_options

if TYPE_CHECKING:
    from tqexport.integer.price import WidthPrice

_HELD_OUT = 4  # one sample in so many is for the table, not for the grids


@click.command("calibrate")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Samples to find grids from, as tqexport verify takes them; three of four are for the grids, the rest for the "
    "table.",
)
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The checkpoint to write. Default: CHECKPOINT's name with -int.",
)
@click.option(
    "--estimator",
    type=click.Choice(["min-max", "percentile", "mse"]),
    default="min-max",
    show_default=True,
    help="How a grid follows from the values seen: all of them, all but 0.01 %% at either end, or the range of the "
    "least squared error.",
)
@click.option(
    "--symmetric",
    is_flag=True,
    help="Put zero in the middle of every grid, as --kernel integer-symmetric wants; values that are never negative "
    "lose a bit so.",
)
@checkpoint_options
@output_options
def command(
    checkpoint: Path,
    data: Path,
    target: Path | None,
    estimator: str,
    symmetric: bool,
    options: ReadOptions,
    output: Output,
) -> None:
    """Give CHECKPOINT the grids that integers need, and write it as a checkpoint of its own.

    Every value that no activation quantiser rounds gets 256 levels at every width, and the float layers' weights become
    int8. PyTorch then runs the integer network, and --kernel integer exports it. The table says what that costs.
    """
    path = target or checkpoint.with_name(f"{checkpoint.stem}-int{checkpoint.suffix}")
    with output.step(f"Reading {checkpoint}"):
        from tqexport.checkpoints.checkpoint import load_checkpoint, save_checkpoint
        from tqexport.errors import UsageError
        from tqexport.files import ensure_folder
        from tqexport.integer.calibration import calibrate
        from tqexport.integer.price import price_of_grids
        from tqexport.verification.samples import load_samples

        if path.exists() and checkpoint.exists() and path.samefile(checkpoint):
            raise UsageError(f"{path} is the checkpoint itself; name another file to write")
        model = load_checkpoint(checkpoint, options)
        ensure_folder(path.parent)
        samples = load_samples(data, model)
    held_out = [i for i in range(len(samples)) if i % _HELD_OUT == 0]
    chosen = [i for i in range(len(samples)) if i % _HELD_OUT]
    with output.step(f"Finding grids at {len(model.info.widths)} widths"):
        calibrated = calibrate(model, samples.inputs[0][chosen], estimator, symmetric=symmetric)  # type: ignore[arg-type]
    with output.step("Comparing"):
        labels = samples.labels[held_out] if samples.labels is not None else None
        prices = price_of_grids(model, calibrated, samples.inputs[0][held_out], labels)
    save_checkpoint(path, calibrated.module, calibrated.info)
    output.say(f"{len(calibrated.info.grids)} values got grids from {len(chosen)} samples, {estimator}")
    _say_prices(output, prices, len(held_out))
    output.say(f"{path}  {path.stat().st_size:,} bytes")
    output.document(
        {
            "checkpoint": str(path),
            "source": str(checkpoint),
            "source_sha256": model.sha256,
            "estimator": estimator,
            "symmetric": symmetric,
            "samples": {"grids": len(chosen), "table": len(held_out)},
            "grids": list(calibrated.info.grids),
            "widths": [asdict(price) for price in prices],
        }
    )


def _say_prices(output: Output, prices: list[WidthPrice], count: int) -> None:
    """Print what the grids cost at each width."""
    labelled = prices[0].before is not None
    columns = ("bits", *(("accuracy\nbefore", "after") if labelled else ()), "top-1\nagrees", "output\nerror")
    rows = []
    for price in prices:
        met = [f"{100 * share:.1f} %" for share in (price.before, price.after) if share is not None]
        rows.append([str(price.bits), *met, f"{100 * price.agreement:.1f} %", f"{100 * price.error:.1f} %"])
    output.table(columns, rows, caption=f"on {count} other samples", caption_justify="left")
