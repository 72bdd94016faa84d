"""``tqexport gap``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tqexport.checkpoints.options import ReadOptions

from .common import Output, Widths, checkpoint_options, output_options, plural_bits, widths_option

if TYPE_CHECKING:
    from tqexport.analysis.gap import Gap, WidthGap


@click.command("gap")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@widths_option("every width of the checkpoint")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Samples to run both ways, as tqexport verify takes them."
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: a PNG, SVG or PDF file.")
@checkpoint_options
@output_options
def command(
    checkpoint: Path,
    widths: Widths | None,
    data: Path | None,
    plot: Path | None,
    options: ReadOptions,
    output: Output,
) -> None:
    """Measure what changes where the 8-bit codes of CHECKPOINT are shifted instead of quantising anew.

    Per layer and width: codes changed and weight error; with --data, accuracy both ways. TruncQuant has no such gap;
    a network trained with --quantizer dorefa has, and what the same weights would lose is shown in both cases.
    """
    with output.step(f"Reading {checkpoint}"):
        from tqexport.analysis.gap import check_plot, measure_gap, plot_gap
        from tqexport.checkpoints.checkpoint import load_checkpoint
        from tqexport.verification.run import load_samples

        if plot:
            check_plot(plot)
        model = load_checkpoint(checkpoint, options)
        samples = load_samples(data, model) if data else None
    asked = widths.resolve(model.info.widths) if widths else model.info.widths
    with output.step(f"Measuring {len(asked)} widths"):
        gap = measure_gap(model, asked, *((samples.inputs, samples.labels) if samples else ()))
    first = gap.widths[0]
    where = f", accuracy {samples.description}" if samples else ""
    output.say(f"{checkpoint}: {first.total.weights:,} codes in {len(first.layers)} layers, {gap.quantizer}{where}")
    _say_widths(output, gap)
    _say_layers(output, gap)
    output.say(*_conclusion(gap))
    if plot:
        plot_gap(gap, plot)
        output.say(f"{plot}  {plot.stat().st_size:,} bytes")
    output.document(
        {"checkpoint": str(checkpoint), "sha256": model.sha256, **asdict(gap), "closed": gap.closed}
        | ({"samples": samples.description} if samples else {})
        | ({"plot": str(plot)} if plot else {})
    )


def _say_widths(output: Output, gap: Gap) -> None:
    """Print what shifting changes at each width."""
    rounds = gap.quantizer == "dorefa"
    accuracy = gap.widths[0].accuracy
    columns = ["bits", "codes\nchanged", "weight\nerror"]
    columns += [] if rounds else ["changed\nif rounded", "error\nif rounded"]
    columns += ["top-1\nagrees"] if accuracy else []
    columns += ["accuracy\nquantised", "accuracy\ntruncated"] if accuracy and accuracy.quantized is not None else []
    rows = []
    for width in gap.widths:
        totals = (width.total,) if rounds else (width.total, width.rounded_total)
        shares = [share for total in totals for share in (total.changed_share, total.error)]
        if width.accuracy:
            both = (width.accuracy.quantized, width.accuracy.truncated)
            shares += [width.accuracy.agreement, *(share for share in both if share is not None)]
        rows.append((str(width.bits), *map(_percent, shares)))
    output.table(columns, rows)


def _say_layers(output: Output, gap: Gap) -> None:
    """Print what rounding changes in each layer: the checkpoint's own quantiser has a gap only if it rounds.

    Weight errors are in the JSON document; here they would not fit beside the codes.
    """
    condition = "" if gap.quantizer == "dorefa" else " if the weights were rounded"
    rows = [
        (name, *(f"{100 * width.rounded_layers[name].changed_share:.1f}" for width in gap.widths))
        for name in gap.widths[0].rounded_layers
    ]
    title = f"Codes changed{condition}, % of each layer"
    columns = ("layer", *(plural_bits(width.bits) for width in gap.widths))
    output.table(columns, rows, left=("layer",), title=title, title_justify="left", title_style="")


def _conclusion(gap: Gap) -> list[str]:
    """What the figures mean, in one or two lines."""
    worst = max(gap.widths, key=lambda width: width.rounded_total.changed)
    changes = f"{_percent(worst.rounded_total.changed_share)} of the codes at {worst.bits} bits"
    if gap.quantizer != "dorefa":
        lines = ["No gap: shifting the 8-bit codes gives exactly what quantising to each width gives."]
        return lines + ([f"Rounding the same weights would change {changes}."] if worst.rounded_total.changed else [])
    if gap.closed:
        return ["No code changes at these widths; others may."]
    lines = [f"These codes must not be shifted: that would change {changes}."]
    if measured := [width for width in gap.widths if width.accuracy and width.accuracy.quantized is not None]:
        lines.append(_accuracy_line(max(measured, key=_lost)))
    return lines


def _lost(width: WidthGap) -> float:
    accuracy = width.accuracy
    return (accuracy.quantized or 0.0) - (accuracy.truncated or 0.0) if accuracy else 0.0


def _accuracy_line(width: WidthGap) -> str:
    if width.accuracy is None or _lost(width) <= 0:
        return "On these samples accuracy does not fall."
    quantized, truncated = _percent(width.accuracy.quantized or 0.0), _percent(width.accuracy.truncated or 0.0)
    return f"At {width.bits} bits accuracy falls from {quantized} to {truncated}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
