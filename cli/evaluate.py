"""``tqexport evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tqexport.backends import RUNTIMES
from tqexport.checkpoints.options import ReadOptions
from tqexport.extras import needs

from .common import Output, Widths, checkpoint_options, output_options, widths_option

if TYPE_CHECKING:
    from tqexport.evaluation.result import Evaluation

_SHOWN = 12  # subjects that a table of pairs has room for


@click.command("evaluate")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data",
    "patterns",
    required=True,
    multiple=True,
    metavar="PATTERN",
    help="NPZ files as for verify, .tar archives in the way of WebDataset, or a folder with a folder of pictures per "
    "class; * and ? allowed, and URLs that fsspec opens. May be given several times.",
)
@widths_option("the widths exported")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice([*RUNTIMES, "pytorch"]),
    help="Evaluate in this runtime alone; may be given several times. web is onnxruntime-web in Node. Default: in all "
    "that are installed, but web and PyTorch.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes of this machine. Default: one for each core.")
@click.option("--scheduler", metavar="ADDRESS", help="Use the workers of a Dask scheduler, e.g. tcp://host:8786.")
@click.option(
    "--resume",
    "journal",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep the counts of each shard in this file as they come; shards that are in it already are not done again.",
)
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Write an HTML page with plots, all in one file."
)
@checkpoint_options
@output_options
@needs("evaluate")
def command(
    source: Path | None,
    patterns: tuple[str, ...],
    widths: Widths | None,
    runtimes: tuple[str, ...],
    workers: int | None,
    scheduler: str | None,
    journal: Path | None,
    report: Path | None,
    options: ReadOptions,
    output: Output,
) -> int:
    """Measure accuracy and agreement on data of any size, on all cores or a cluster.

    SOURCE is an export folder (default ./tqexport-out) or a checkpoint. Each part of the data (a file, or 512 pictures)
    goes to a worker that runs every artifact on it and gives counts back; counts add up to the same result whoever
    counts, in whatever order. A worker that is lost costs the part that it was at. verify says whether an export is
    right; evaluate says how good the network is.
    """
    if workers and scheduler:
        raise click.UsageError("--workers is for this machine; the scheduler has workers of its own.")
    with output.step("Starting"):
        from tqexport.artifacts.project import open_project
        from tqexport.evaluation.run import evaluate

        if report:
            from tqexport.evaluation.report import render_report
            from tqexport.files import write_bytes
            from tqexport.html.page import check_report

            check_report(report)
        project = open_project(source, None, options, output.step)
        asked = widths.resolve(project.widths) if widths else project.exported_widths()
    with _progress(output) as advance:
        evaluation = evaluate(
            project, asked, patterns, runtimes, count=workers, scheduler=scheduler, journal=journal, advance=advance
        )
    counts, parts = evaluation.counts, f"{evaluation.shards:,} shard{'s' * (evaluation.shards != 1)}"
    without = "" if counts.labelled else ", without labels of their classes"
    output.say(f"{evaluation.checkpoint} on {counts.samples:,} samples in {parts}{without}")
    _say_tables(output, evaluation)
    if report:
        with output.step(f"Writing {report}"):
            write_bytes(report, render_report(evaluation, project.model.info.class_names))
        output.say(f"{report}  the report")
    output.document(evaluation.document())
    return 0


@contextmanager
def _progress(output: Output) -> Iterator[Callable[[int, int, int], object]]:
    """Show how far it is and how long it will take; on a terminal only."""
    from rich import progress

    columns = (
        progress.TextColumn("Evaluating"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("shards, {task.fields[rate]} samples/s,"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    shown = progress.Progress(
        *columns, console=output.progress, disable=not output.progress.is_terminal, transient=True
    )
    with shown:
        task = shown.add_task("", total=None, rate="-")

        def advance(done: int, shards: int, samples: int) -> None:
            seconds = shown.tasks[0].elapsed or 0.0
            rate = f"{samples / seconds:,.0f}" if samples and seconds else "-"
            shown.update(task, completed=done, total=shards, rate=rate)

        yield advance


def _say_tables(output: Output, evaluation: Evaluation) -> None:
    """Print a row for each subject, and how often each two agree."""
    subjects, names = evaluation.subjects, [str(number) for number in range(1, len(evaluation.subjects) + 1)]
    labelled = evaluation.counts.labelled > 0
    columns = ["", "bits", "runtime", "file", *(["accuracy", "95 % interval", "most confused"] if labelled else [])]
    rows = []
    for index, subject in enumerate(subjects):
        cells = [names[index], str(subject.bits), subject.title, subject.file]
        if labelled:
            low, high = evaluation.interval(index) or (0.0, 0.0)
            cells += [f"{100 * (evaluation.accuracy(index) or 0):.2f} %", f"{100 * low:.2f} to {100 * high:.2f}"]
            confused = evaluation.confused(index)
            cells.append("" if confused is None else f"{confused[0]} as {confused[1]} ({confused[2]:,})")
        widest = evaluation.widest(index)
        cells.append("" if widest == index else f"{100 * evaluation.agreement(index, widest):.2f} %")
        rows.append(cells)
    output.table((*columns, "agrees with\nwidest"), rows, left=("runtime", "file", "most confused"))
    if 1 < len(subjects) <= _SHOWN:
        output.say("Agreement in percent of the samples, of each two:")
        shares = [
            [names[row], *(f"{100 * evaluation.agreement(row, column):.2f}" for column in range(len(subjects)))]
            for row in range(len(subjects))
        ]
        output.table(("", *names), shares)
