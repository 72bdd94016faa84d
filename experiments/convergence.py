"""Convergence of ResNet-8 on digits: TruncQuant against ordinary quantisation-aware training and float.

python -m experiments.convergence    writes convergence.json and convergence.png

Four ways, the same recipe and data: float; an ordinary (``dorefa``) network of its own for each width; a TruncQuant
network of its own for each width; and one TruncQuant network trained jointly at all widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from experiments.data import digits, shifted
from experiments.results import in_parallel, options, spread, write_json
from experiments.training import Recipe, accuracy, train
from tqexport import Scheme
from tqexport.networks.tiny_models import _ResNet8, resnet8
from tqexport.truncation import FLOAT_BITS

WIDTHS = (1, 2, 3, 4, 6, 8)
FLOAT, ORDINARY, SINGLE, JOINT = "float", "ordinary", "TruncQuant, one width", "TruncQuant, joint"
RECIPES = {FLOAT: Recipe(), ORDINARY: Recipe(Scheme("dorefa")), SINGLE: Recipe(), JOINT: Recipe()}


@dataclass(frozen=True)
class Job:
    """One training run."""

    way: str
    widths: tuple[int, ...]
    seed: int
    epochs: int


def jobs(seeds: int, epochs: int) -> list[Job]:
    """Every run, the long ones first."""
    widths = {FLOAT: [(FLOAT_BITS,)], JOINT: [WIDTHS]}
    singly = [(bits,) for bits in WIDTHS]
    return [
        Job(way, group, seed, epochs)
        for way in (JOINT, SINGLE, ORDINARY, FLOAT)
        for seed in range(seeds)
        for group in widths.get(way, singly)
    ]


def run(job: Job) -> dict[int, list[float]]:
    """Held-out accuracy after each epoch, by width."""
    torch.manual_seed(job.seed)
    data = digits(job.seed)
    network: nn.Module = _ResNet8(1, 10, 16) if job.way == FLOAT else resnet8(1, 10, 16, widths=job.widths)
    curves: dict[int, list[float]] = {bits: [] for bits in job.widths}

    def measure() -> None:
        for bits, curve in curves.items():
            curve.append(accuracy(network, data, bits))

    train(network, data, job.widths, job.epochs, job.seed, RECIPES[job.way], shifted, measure)
    return curves


def collect(runs: Sequence[tuple[Job, Mapping[int, Sequence[float]]]]) -> dict[str, Any]:
    """By way and width: final accuracy over seeds, and the mean curve."""
    table: dict[str, Any] = {}
    for way in RECIPES:
        for bits in (FLOAT_BITS,) if way == FLOAT else WIDTHS:
            curves = [curve[bits] for job, curve in runs if job.way == way and bits in curve]
            mean = [round(100 * sum(epoch) / len(epoch), 2) for epoch in zip(*curves, strict=True)]
            table.setdefault(way, {})[str(bits)] = {**spread(curve[-1] for curve in curves), "curve": mean}
    return table


def draw(table: Mapping[str, Any], path: Path) -> None:
    """One panel per width: mean held-out accuracy after each epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, bits in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, WIDTHS, strict=True):
        for way, style in ((FLOAT, "k:"), (ORDINARY, "C1-"), (SINGLE, "C0--"), (JOINT, "C2-")):
            curve = table[way][str(FLOAT_BITS if way == FLOAT else bits)]["curve"]
            axes.plot(range(1, len(curve) + 1), curve, style, lw=1.3, label=way)
        axes.set_title(f"{bits} bit{'s' * (bits > 1)}", fontsize=10)
        axes.grid(alpha=0.3)
    for axes in figure.axes[3:]:
        axes.set_xlabel("epoch")
    for axes in figure.axes[::3]:
        axes.set_ylabel("held-out accuracy, %")
    figure.axes[0].set_ylim(60, 101)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


@click.command()
@options(seeds=4)
def main(seeds: int, epochs: int, workers: int, folder: Path) -> None:
    """Train, measure and draw."""
    every = jobs(seeds, epochs)
    table = collect(list(zip(every, in_parallel(run, every, workers), strict=True)))
    write_json(folder / "convergence.json", {"seeds": seeds, "epochs": epochs, "accuracy_percent": table})
    draw(table, folder / "convergence.png")


if __name__ == "__main__":
    main()
