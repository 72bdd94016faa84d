"""``tqexport verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tqexport.options import ReadOptions

from .common import Output, Widths, checkpoint_options, output_options, widths_option

if TYPE_CHECKING:
    from rich.table import Table

    from tqexport.verification import Checked

PARITY_FAILED = 1


@click.command("verify")
@click.argument("source", type=click.Path(path_type=Path), required=False)
@widths_option("the widths exported")
@click.option(
    "--data", type=click.Path(path_type=Path), help="NPZ file with inputs (N, ...) and, optionally, labels (N)."
)
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Random samples without --data.")
@checkpoint_options
@output_options
def command(
    source: Path | None,
    widths: Widths | None,
    data: Path | None,
    samples: int,
    options: ReadOptions,
    as_json: bool,
    verbose: bool,
) -> int:
    """Prove that onnxruntime and LiteRT compute what PyTorch computes.

    SOURCE is an export folder (default ./tqexport-out) or a checkpoint. Widths that were not exported are exported to
    a temporary place. Exit code 1 if anything differs.
    """
    output = Output(as_json=as_json, verbose=verbose)
    with output.step("Starting"):
        from tqexport.project import open_project
        from tqexport.verification import load_samples, random_samples, verify

        project = open_project(source, None, options, output.step)
    asked = widths.resolve(project.widths) if widths else project.exported_widths()
    chosen = load_samples(data, project.model) if data else random_samples(project.model, samples)
    checked = list(verify(project, asked, chosen))
    passed = all(check.verdict.passed for check in checked)

    output.say(f"{project.checkpoint} against its exports, {chosen.description}")
    output.say(_table(checked))
    if any(check.temporary for check in checked):
        output.say("* not exported yet; exported for this check alone")
    for check in checked:
        for problem in check.verdict.problems:
            output.say(f"{check.verdict.bits} bits, {check.verdict.runtime}: {problem}")
    if any(check.verdict.activations_wrong and check.verdict.passed for check in checked):
        output.say("dynamic: the weights are the trained ones; the kernels round their input, and activations follow")
    output.say("PASS: every artifact equals PyTorch" if passed else "FAIL: an artifact differs from PyTorch")
    output.document(
        {
            "passed": passed,
            "checkpoint": str(project.checkpoint),
            "samples": chosen.description,
            "results": [
                {"artifact": check.file, "temporary": check.temporary, "bytes": check.bytes, **asdict(check.verdict)}
                for check in checked
            ],
        }
    )
    return 0 if passed else PARITY_FAILED


def _table(checked: list[Checked]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("bits", "runtime", "bytes", "codes", "activa-\ntions", "flips", "output\nerror", "top-1\nagrees")
    labelled = any(check.verdict.accuracy is not None for check in checked)
    for column in (*columns, *(("accu-\nracy", "in Py-\nTorch") if labelled else ()), "verdict"):
        table.add_column(column, justify="left" if column in ("runtime", "verdict") else "right", no_wrap=True)
    for check in checked:
        verdict = check.verdict
        accuracies = (_percent(verdict.accuracy), _percent(verdict.reference_accuracy)) if labelled else ()
        table.add_row(
            f"{verdict.bits}{'*' if check.temporary else ''}",
            verdict.runtime,
            f"{check.bytes:,}",
            "equal" if not verdict.codes_wrong else f"{verdict.codes_wrong:,} differ",
            "equal" if not verdict.activations_wrong else f"{verdict.activations_wrong:,} differ",
            f"{verdict.flips:,}",
            f"{verdict.output_error:.1e}",
            _percent(verdict.top1_agreement),
            *accuracies,
            "pass" if verdict.passed else "FAIL",
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
