"""The results of ``verify`` as one HTML page, with plots, that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tqexport.html.page import COLORS, TEXT, Plot, plot, render_page
from tqexport.model import TruncModel
from tqexport.truncation import max_code
from tqexport.verification.codes import expected_codes
from tqexport.verification.run import Checked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["render_report"]

TEMPLATE = "report.html.j2"
_TEXT_COLUMNS = {"runtime", "verdict", "file", "worst layer"}  # all others hold numbers


def render_report(model: TruncModel, title: str, checked: Sequence[Checked], conclusion: str) -> bytes:
    """The HTML page as UTF-8.

    Args:
        model: The reference.
        title: What was compared, one line.
        checked: The results.
        conclusion: The verdict, one line.
    """
    rows = [_row(check) for check in checked]
    layer_columns, layer_rows = _layers(checked)
    return render_page(
        __package__,
        TEMPLATE,
        title=title,
        passed=all(check.passed for check in checked),
        conclusion=conclusion,
        problems=[f"{check.bits} bits, {check.runtime}: {text}" for check in checked for text in check.problems],
        columns=[(heading, "text" if heading in _TEXT_COLUMNS else "") for heading in rows[0]],
        rows=[list(row.values()) for row in rows],
        plots=list(_plots(model, checked)),
        layer_columns=layer_columns,
        layer_rows=layer_rows,
    )


def _row(check: Checked) -> dict[str, str]:
    """The cells of an artifact and width by the heading of their column."""
    verdict = check.deployed
    name, error = check.unoptimized.worst_layer
    interval = verdict.accuracy_interval
    return {
        "bits": str(check.bits),
        "runtime": check.runtime,
        "verdict": "pass" if check.passed else "FAIL",
        "file": f"{check.file}{' (for this check alone)' if check.temporary else ''}",
        "bytes": f"{check.bytes:,}",
        "ms": "-" if check.latency is None else f"{1000 * check.latency:.2f}",
        "codes": f"{verdict.codes:,} equal" if not verdict.codes_wrong else f"{verdict.codes_wrong:,} differ",
        "flips": f"{verdict.flips:,} of {verdict.activations:,}",
        "activations that differ": f"{verdict.activations_wrong:,}",
        "worst layer": f"{error:.1e} {name}",
        "output error": f"{verdict.output_error:.1e}",
        "top-1 agrees": _percent(verdict.top1_agreement),
        "accuracy": _percent(verdict.accuracy),
        "95 % interval": f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else "-",
        "PyTorch": _percent(verdict.reference_accuracy),
    }


def _layers(checked: Sequence[Checked]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """The error of each layer, a column per artifact and width."""
    names = list(dict.fromkeys(name for check in checked for name in check.unoptimized.layers))

    def cell(check: Checked, name: str) -> str:
        layer = check.unoptimized.layers.get(name)
        return "-" if layer is None else f"{layer.error:.1e}"

    columns = [("layer", "text"), *((f"{check.bits} bits, {check.runtime}", "") for check in checked)]
    return columns, [[name, *(cell(check, name) for check in checked)] for name in names]


def _plots(model: TruncModel, checked: Sequence[Checked]) -> Iterator[Plot]:
    """Everything drawn; what was not run has no latency, flips or agreement."""
    run = [check for check in checked if check.latency is not None]
    yield plot("Size by width", "kB of the file", lambda axes: _bars(axes, checked, lambda check: check.bytes / 1000))
    if any(check.deployed.accuracy is not None for check in run):
        yield plot("Accuracy by width", "with 95 % confidence intervals, %", lambda axes: _accuracy(axes, run))
    elif run:
        yield plot(
            "Top-1 agreement by width",
            "share of samples with PyTorch's largest output, %",
            lambda axes: _by_width(axes, run, lambda check: 100 * check.deployed.top1_agreement),
        )
    if run:
        yield plot(
            "Latency by width",
            "ms for one sample on one thread",
            lambda axes: _bars(axes, run, lambda check: 1000 * (check.latency or 0)),
        )
        yield plot(
            "Flips by width",
            "activations per million on the other side of their boundary",
            lambda axes: _bars(
                axes, run, lambda check: 1e6 * check.deployed.flips / max(check.deployed.activations, 1)
            ),
        )
    if any(check.unoptimized.layers for check in checked):
        yield plot(
            "Error by layer",
            "largest difference given the same input, as a share of the layer's largest output; "
            "the line is what rounding explains",
            lambda axes: _errors(axes, checked),
            wide=True,
        )
    yield from _histograms(model, sorted({check.bits for check in checked}))


def _accuracy(axes: Axes, checked: Sequence[Checked]) -> None:
    """Accuracy with its interval, and a line for that of PyTorch."""
    reference = {check.bits: check.deployed.reference_accuracy or 0.0 for check in checked}
    axes.plot(list(reference), [100 * value for value in reference.values()], color=TEXT, linewidth=1, label="PyTorch")
    for place, chosen, style in _series(checked):
        shares = np.array([100 * (check.deployed.accuracy or 0) for check in chosen])
        ends = np.array([check.deployed.accuracy_interval or (0, 0) for check in chosen]) * 100
        lengths = np.clip([shares - ends[:, 0], ends[:, 1] - shares], 0, None)
        widths = [check.bits + 0.12 * place for check in chosen]
        axes.errorbar(widths, shares, lengths, fmt="o", markersize=4, capsize=2, **style)
    axes.margins(y=0.3)  # room for the legend
    _finish(axes, checked)


def _by_width(axes: Axes, checked: Sequence[Checked], value: Callable[[Checked], float]) -> None:
    """A share in percent as a line for each runtime."""
    for _, chosen, style in _series(checked):
        axes.plot([check.bits for check in chosen], [value(check) for check in chosen], "o-", markersize=4, **style)
    axes.set_ylim(min(90.0, axes.get_ylim()[0]), 101)
    _finish(axes, checked)


def _bars(axes: Axes, checked: Sequence[Checked], value: Callable[[Checked], float]) -> None:
    """A bar for each runtime and width."""
    width = 0.8 / len(_runtimes(checked))
    for place, chosen, style in _series(checked):
        axes.bar([check.bits + width * place for check in chosen], [value(check) for check in chosen], width, **style)
    axes.margins(y=0.25)  # room for the legend
    axes.yaxis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]
    _finish(axes, checked)


def _errors(axes: Axes, checked: Sequence[Checked]) -> None:
    """The error of each layer, the worst over all widths for each runtime; and the largest bound as a line."""
    names = list(dict.fromkeys(name for check in checked for name in check.unoptimized.layers))
    bounds: dict[str, float] = {}
    for _, chosen, style in _series(checked):
        errors: dict[str, float] = {}
        for name, layer in (item for check in chosen for item in check.unoptimized.layers.items()):
            errors[name] = max(errors.get(name, 0.0), layer.error, 1e-9)  # a logarithmic axis has no 0
            bounds[name] = max(bounds.get(name, 0.0), layer.bound, 1e-9)
        axes.plot([names.index(name) for name in errors], list(errors.values()), "o", markersize=4, **style)
    axes.step(range(len(names)), [bounds[name] for name in names], where="mid", color=TEXT, linewidth=0.8)
    axes.set_yscale("log")
    step = max(1, -(-len(names) // 24))
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", rotation_mode="anchor")
    axes.legend(frameon=False, ncols=3, labelcolor=TEXT)


def _histograms(model: TruncModel, widths: Sequence[int]) -> Iterator[Plot]:
    """How the weights of all quantised layers spread over the levels of each width."""
    for bits in widths:
        codes = np.concatenate([weight.codes.ravel() for weight in expected_codes(model, bits).values()])
        counts = np.bincount(codes, minlength=max_code(bits) + 1) / codes.size

        def draw(axes: Axes, counts: Any = counts, bits: int = bits) -> None:
            levels = 2 * np.arange(len(counts)) / max_code(bits) - 1
            axes.bar(levels, 100 * counts, 1.8 / len(counts), color=COLORS[0])
            axes.set_xlim(-1.1 - 1 / len(counts), 1.1 + 1 / len(counts))
            axes.set_xlabel("weight, in units of the layer's E")

        yield plot(f"Weights at {bits} bit{'s' * (bits > 1)}", f"% of weights on each of {1 << bits} levels", draw)


def _series(checked: Sequence[Checked]) -> Iterator[tuple[float, list[Checked], dict[str, Any]]]:
    """For each runtime: its place among them, centred on 0; its results; and the settings of what is drawn."""
    runtimes = _runtimes(checked)
    for number, runtime in enumerate(runtimes):
        style = {"color": COLORS[number % len(COLORS)], "label": runtime}
        yield number - (len(runtimes) - 1) / 2, [check for check in checked if check.runtime == runtime], style


def _runtimes(checked: Sequence[Checked]) -> list[str]:
    return list(dict.fromkeys(check.runtime for check in checked))


def _finish(axes: Axes, checked: Sequence[Checked]) -> None:
    """Give a plot by width its axis and its legend."""
    widths = sorted({check.bits for check in checked})
    axes.set_xticks(widths)
    axes.set_xlim(widths[0] - 0.7, widths[-1] + 0.7)
    axes.set_xlabel("bits")
    axes.legend(frameon=False, ncols=2, labelcolor=TEXT)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
