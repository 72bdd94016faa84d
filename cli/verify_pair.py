"""``tqexport verify ARTIFACT ARTIFACT``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import UsageError

from .common import Output, Widths

if TYPE_CHECKING:
    from tqexport.verification.pair import PairVerdict


def verify_pair(
    output: Output,
    sources: tuple[Path, ...],
    widths: Widths | None,
    data: Path | None,
    samples: int,
    report: Path | None,
    options: ReadOptions,
) -> int:
    """Compare two artifacts with each other; returns the exit code."""
    if len(sources) != 2:
        raise UsageError(
            f"name two artifacts to compare them with each other, not {len(sources)}, or a checkpoint in front of them"
        )
    if report or options.given():
        raise UsageError(
            "two artifacts are compared without a checkpoint; leave out --report and what says how to read one"
        )
    chosen = widths.listed if widths else ()
    if widths and len(chosen) != 1:
        raise UsageError("two artifacts are compared at one width at a time; name it with --bits")
    with output.step("Starting"):
        from tqexport.verification.pair import compare_artifacts, open_pair, samples_for

        pair = open_pair((sources[0], sources[1]), next(iter(chosen), None))
        compared = samples_for(pair[0], data, samples)
    with output.step(f"Comparing {sources[0]} with {sources[1]}"):
        verdict = compare_artifacts(pair, compared)
    output.say(f"{sources[0]} against {sources[1]} at {verdict.bits} bits, {compared.description}")
    _say_sides(output, verdict)
    output.say(
        f"{verdict.codes:,} codes, {verdict.codes_wrong:,} differ; {verdict.activations:,} activations, "
        f"{verdict.activations_wrong:,} differ, {verdict.flips:,} flips; outputs off by {verdict.output_error:.1e}; "
        f"top-1 agrees on {100 * verdict.top1_agreement:.1f} %"
    )
    output.say(
        *verdict.problems,
        "PASS: the artifacts are equal"
        if verdict.passed
        else f"FAIL: the artifacts differ, first in {verdict.diverged}; tqexport verify CHECKPOINT says which is wrong",
    )
    output.document({"passed": verdict.passed, **asdict(verdict)})
    return 0 if verdict.passed else 1


def _say_sides(output: Output, verdict: PairVerdict) -> None:
    """Print a row for each of the two artifacts."""
    labelled = verdict.sides[0].accuracy_interval is not None
    columns = ("artifact", "runtime", "bytes", "ms", *(("accuracy, %",) if labelled else ()))
    rows = []
    for side in verdict.sides:
        low, high = side.accuracy_interval or (0.0, 0.0)
        accuracy = (f"{100 * (side.accuracy or 0):.1f} ({100 * low:.1f}-{100 * high:.1f})",) if labelled else ()
        rows.append((side.artifact, side.runtime, f"{side.bytes:,}", f"{1000 * side.latency:.2f}", *accuracy))
    output.table(columns, rows, left=("artifact", "runtime", "accuracy, %"), collapse_padding=True)
