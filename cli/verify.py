"""``tqexport verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tqexport.backends import BACKENDS, RUNTIMES
from tqexport.checkpoints.options import ReadOptions
from tqexport.extras import needs

from .common import Output, Widths, checkpoint_options, output_options, widths_option

if TYPE_CHECKING:
    from tqexport.verification.comparison import Verdict
    from tqexport.verification.run import Checked

PARITY_FAILED = 1
_WIDE = 125  # columns that the whole table takes


@click.command("verify")
@click.argument("sources", metavar="[SOURCE] [ARTIFACT]...", type=click.Path(path_type=Path), nargs=-1)
@widths_option("the widths exported")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="NPZ file with inputs (N, ...) and, optionally, labels (N); or a folder with a folder of pictures per class.",
)
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Random samples without --data.")
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Write an HTML page with plots, all in one file."
)
@click.option(
    "--attest",
    "statement",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what was compared and found, pass or fail, as an in-toto statement with the sha256 of every file.",
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(RUNTIMES),
    help="Compare in this runtime alone; may be given several times. web is onnxruntime-web, which browsers have, in "
    "Node. Default: in all that are installed, but web.",
)
@checkpoint_options
@output_options
@needs("onnx")
def command(
    sources: tuple[Path, ...],
    widths: Widths | None,
    data: Path | None,
    samples: int,
    report: Path | None,
    statement: Path | None,
    runtimes: tuple[str, ...],
    options: ReadOptions,
    output: Output,
) -> int:
    """Prove that onnxruntime and LiteRT compute what PyTorch computes.

    SOURCE is an export folder (default ./tqexport-out) or a checkpoint. Widths that were not exported are exported to
    a temporary place. With ARTIFACTs behind it these are compared instead, wherever they lie; they may have been
    rewritten since their export, by onnxsim for example. Two ARTIFACTs without a SOURCE are compared with each other;
    --bits says at which width run-time files are to run. Exit code 1 if anything differs.
    """
    files = [source for source in sources if source.suffix[1:].lower() in BACKENDS]
    if files and len(files) == len(sources):
        from .verify_pair import verify_pair

        if runtimes:
            raise click.UsageError("--runtime is for an export folder; two artifacts run as they are deployed.")
        if statement:
            raise click.UsageError("--attest is for an export folder: it says that artifacts equal their checkpoint.")
        return verify_pair(output, sources, widths, data, samples, report, options)
    with output.step("Starting"):
        from tqexport.artifacts.project import open_project
        from tqexport.files import write_bytes
        from tqexport.verification.jobs import jobs_of, jobs_of_files
        from tqexport.verification.run import load_samples, random_samples, verify

        if report:
            from tqexport.html.page import check_report
            from tqexport.verification.report import render_report

            check_report(report)
        if statement:
            from tqexport.verification.statement import prepare_statement, render_statement

            prepare_statement(statement)
        if [*sources[1:]] != files:
            endings = ", ".join(f".{ending}" for ending in BACKENDS)
            raise click.UsageError(
                f"{sources[1]} does not end as a file to compare ({endings}); these stand behind one checkpoint or "
                "export folder."
            )
        project = open_project(next(iter(sources), None), None, options, output.step)
        asked = widths.resolve(project.widths) if widths else project.exported_widths()
        if files:
            jobs = jobs_of_files(project, files, widths.listed if widths else (), runtimes)
        else:
            list(project.artifacts(asked))  # before any slow work: are the files as they were exported?
    chosen = load_samples(data, project.model) if data else random_samples(project.model, samples)
    jobs = jobs if files else jobs_of(project, asked, runtimes)
    checked = list(verify(project, jobs, chosen, runtimes))
    passed = all(check.passed for check in checked)

    against = ", ".join(map(str, files)) or "its exports"
    title = f"{project.checkpoint} against {against}, {chosen.description}"
    output.say(title)
    _say_table(output, checked)
    left_out = dict.fromkeys(job.backend.left_out(job.kernel) for job in jobs if not runtimes)
    output.say(*_notes(checked), *filter(None, left_out), _conclusion(checked))
    if report:
        with output.step(f"Writing {report}"):
            write_bytes(report, render_report(project.model, title, checked, _conclusion(checked)))
        output.say(f"{report}  the report")
    if statement:
        write_bytes(statement, render_statement(project, checked, chosen, data, runtimes))
        output.say(f"{statement}  the statement, unsigned")
    output.document(
        {
            "passed": passed,
            "checkpoint": str(project.checkpoint),
            "samples": chosen.description,
            "results": [_document(check) for check in checked],
        }
    )
    return 0 if passed else PARITY_FAILED


def _notes(checked: list[Checked]) -> list[str]:
    """Footnotes of the table, and every problem."""
    notes = []
    if any(check.temporary for check in checked):
        notes.append("* not exported yet; exported for this check alone")
    if any(check.deployed.activations_wrong and check.passed for check in checked):
        notes.append("dynamic: the weights are the trained ones; the kernels round their input, and activations follow")
    notes += _absent(checked)
    notes += _unproved(checked)
    for check in checked:
        notes += [f"{check.bits} bits, {check.runtime}: {problem}" for problem in check.problems]
    return notes


def _unproved(checked: list[Checked]) -> list[str]:
    """Files of which the samples alone say that they are right."""
    return [
        f"{check.file} at {check.bits} bits: parameters {check.unoptimized.parameters}; the verdict is of the samples"
        for check in checked
        if not check.proved
    ]


def _absent(checked: list[Checked]) -> list[str]:
    """What integer files run in elsewhere but were not compared in, because it is not installed."""
    from tqexport.errors import HostError

    kinds = {check.file.rpartition(".")[2] for check in checked if "integer" in check.runtime}
    notes = []
    for backend in (BACKENDS[kind] for kind in sorted(kinds)):
        for runtime in backend.integer_runtimes:
            try:
                backend.check_runtime(runtime)
            except HostError as error:
                notes.append(f"not compared in {backend.integer_runtimes[runtime]}: {error}")
    return notes


def _conclusion(checked: list[Checked]) -> str:
    """The verdict in one line, and where to look if it is a bad one."""
    failed = next((check for check in checked if not check.passed), None)
    if failed is None:
        return "PASS: every artifact equals PyTorch"
    return (
        f"FAIL: {failed.file} at {failed.bits} bits differs from PyTorch, first in {failed.diverged}; every layer's "
        f"error is in tqexport verify --bits {failed.bits} --json, and drawn with --report report.html"
    )


def _say_table(output: Output, checked: list[Checked]) -> None:
    """Print a row for each artifact and width; a narrow terminal gets fewer columns."""
    narrow = output.people.width < _WIDE  # leaves out what --json and a listing of the folder have
    labelled = any(check.deployed.accuracy is not None for check in checked)
    columns = ("bits", "runtime", *(() if narrow else ("bytes",)), "ms", "codes", "flips")
    columns += ("worst\nlayer" if narrow else "worst layer", "top-1\nagrees")
    columns += (*(("accu-\nracy", "Py-\nTorch") if labelled else ()), "verdict")
    rows = []
    for check in checked:
        verdict = check.deployed
        name, error = check.unoptimized.worst_layer
        accuracy = _accuracy(verdict, interval=not narrow)
        rows.append(
            (
                f"{check.bits}{'*' if check.temporary else ''}",
                check.runtime.replace("onnxruntime", "ORT") if narrow else check.runtime,
                *(() if narrow else (f"{check.bytes:,}",)),
                "-" if check.latency is None else f"{1000 * check.latency:.2f}",
                "equal" if not verdict.codes_wrong else f"{verdict.codes_wrong:,} differ",
                f"{verdict.flips:,}",
                f"{error:.1e}" + ("" if narrow else f" {name}"),
                f"{100 * verdict.top1_agreement:.1f} %",
                *((accuracy, f"{100 * (verdict.reference_accuracy or 0):.1f}") if labelled else ()),
                "pass" if check.passed else "FAIL",
            )
        )
    output.table(columns, rows, left=("runtime", "worst layer", "accu-\nracy", "verdict"), collapse_padding=True)


def _document(check: Checked) -> dict[str, Any]:
    """The entry of one artifact and width in the JSON document."""

    def entry(verdict: Verdict) -> dict[str, Any]:
        name, error = verdict.worst_layer
        worst = {"worst_layer": name, "worst_layer_error": error, "accuracy_interval": verdict.accuracy_interval}
        return {"passed": verdict.passed, **asdict(verdict), **worst}

    return {
        "artifact": check.file,
        "bits": check.bits,
        "runtime": check.runtime,
        "temporary": check.temporary,
        "bytes": check.bytes,
        "latency_ms": None if check.latency is None else 1000 * check.latency,
        "passed": check.passed,
        "diverged": check.diverged,
        "problems": check.problems,
        "as_deployed": entry(check.deployed),
        "unoptimized": entry(check.unoptimized),
    }


def _accuracy(verdict: Verdict, *, interval: bool) -> str:
    if verdict.accuracy_interval is None:
        return ""
    low, high = (100 * end for end in verdict.accuracy_interval)
    return f"{100 * (verdict.accuracy or 0):.1f}" + (f" ({low:.1f}-{high:.1f})" if interval else "")
