"""The results of ``evaluate`` as one HTML page, with plots, that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tqexport.evaluation.result import Evaluation
from tqexport.html.page import COLORS, Plot, plot, render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["render_report"]

_TEMPLATE = "evaluation.html.j2"
_TEXT_COLUMNS = {"runtime", "file"}  # all others hold numbers
_CLASSES = 30  # that a table of all pairs has room for

_Table = tuple[str, list[tuple[str, str]], list[list[str]]]


def render_report(evaluation: Evaluation, class_names: Sequence[str] = ()) -> bytes:
    """The HTML page as UTF-8.

    Args:
        evaluation: The results.
        class_names: Names of the network's outputs, if known.
    """
    counts, subjects = evaluation.counts, evaluation.subjects
    rows = [_row(evaluation, index) for index in range(len(subjects))]
    names = [row["subject"] for row in rows]
    return render_page(
        __package__,
        _TEMPLATE,
        title=f"{evaluation.checkpoint} on {counts.samples:,} samples",
        conclusion=f"{counts.samples:,} samples in {evaluation.shards:,} shards, {counts.labelled:,} with a label",
        columns=[(heading, "text" if heading in _TEXT_COLUMNS else "") for heading in rows[0]],
        rows=[list(row.values()) for row in rows],
        plots=list(_plots(evaluation)),
        agreement_columns=[("", ""), *((name, "") for name in names)],
        agreement_rows=[
            [name, *(f"{100 * evaluation.agreement(row, column):.2f}" for column in range(len(names)))]
            for row, name in enumerate(names)
        ],
        confusion=list(_confusion(evaluation, class_names)),
    )


def _row(evaluation: Evaluation, index: int) -> dict[str, str]:
    """The cells of a subject by the heading of their column."""
    subject, accuracy, interval = evaluation.subjects[index], evaluation.accuracy(index), evaluation.interval(index)
    low, high = interval or (0.0, 0.0)
    return {
        "subject": str(index + 1),
        "bits": str(subject.bits),
        "runtime": subject.title,
        "file": subject.file,
        "accuracy": "-" if accuracy is None else f"{100 * accuracy:.2f} %",
        "95 % interval": "-" if interval is None else f"{100 * low:.2f} to {100 * high:.2f}",
        "agrees with widest": f"{100 * evaluation.agreement(index, evaluation.widest(index)):.2f} %",
    }


def _plots(evaluation: Evaluation) -> Iterator[Plot]:
    """Accuracy where there are labels, and agreement with the widest, by width."""
    if evaluation.counts.labelled:
        yield plot(
            "Accuracy by width",
            "with 95 % confidence intervals, %",
            lambda axes: _by_width(axes, evaluation, accuracy=True),
        )
    yield plot(
        "Agreement with the widest",
        "share of samples in the class that the same runtime gives at most bits, %",
        lambda axes: _by_width(axes, evaluation, accuracy=False),
    )


def _by_width(axes: Axes, evaluation: Evaluation, accuracy: bool) -> None:
    """A line for each runtime."""
    titles = list(dict.fromkeys(subject.title for subject in evaluation.subjects))
    for number, title in enumerate(titles):
        chosen = [index for index, subject in enumerate(evaluation.subjects) if subject.title == title]
        widths = [evaluation.subjects[index].bits + 0.08 * (number - (len(titles) - 1) / 2) for index in chosen]
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "label": title}
        if accuracy:
            shares = np.array([100 * (evaluation.accuracy(index) or 0) for index in chosen])
            ends = 100 * np.array([evaluation.interval(index) or (0, 0) for index in chosen])
            lengths = np.clip([shares - ends[:, 0], ends[:, 1] - shares], 0, None)
            axes.errorbar(widths, shares, lengths, fmt="o", markersize=4, capsize=2, **style)
        else:
            shares = np.array([100 * evaluation.agreement(index, evaluation.widest(index)) for index in chosen])
            axes.plot(widths, shares, "o-", markersize=4, **style)
    every = sorted({subject.bits for subject in evaluation.subjects})
    axes.margins(y=0.3)  # room for the legend
    axes.set_xticks(every)
    axes.set_xlim(every[0] - 0.7, every[-1] + 0.7)
    axes.set_xlabel("bits")
    axes.legend(frameon=False, ncols=2)


def _confusion(evaluation: Evaluation, class_names: Sequence[str]) -> Iterator[_Table]:
    """For each subject a table of labels against classes; of many classes, the pairs that are confused most."""
    for index, subject in enumerate(evaluation.subjects):
        counter = evaluation.counts.confusion[index]
        if not counter:
            continue
        classes = sorted({value for pair in counter for value in pair})
        names = {value: class_names[value] if value < len(class_names) else str(value) for value in classes}
        where = f"at {subject.bits} bit{'s' * (subject.bits > 1)} in {subject.title}"
        if len(classes) <= _CLASSES:
            columns = [("label", "text"), *((names[value], "") for value in classes)]
            rows = [
                [names[label], *(f"{counter[label, value]:,}" if counter[label, value] else "" for value in classes)]
                for label in classes
            ]
            yield f"Samples of each class (rows) by the class that they were put into, {where}", columns, rows
        else:
            wrong = sorted((-count, pair) for pair, count in counter.items() if pair[0] != pair[1])[:_CLASSES]
            rows = [[names[label], names[value], f"{-count:,}"] for count, (label, value) in wrong]
            columns = [("label", "text"), ("class", "text"), ("samples", "")]
            yield f"The {len(rows)} pairs that are confused most, {where}", columns, rows
