"""Do learned ranges help networks without BatchNorms? A transformer and a GRU that read a digit row by row.

python -m experiments.learned_ranges    writes learned_ranges.json and learned_ranges.png

Each network is trained in float first, and then as long again: in float, or jointly at 1, 2, 4 and 8 bits from its
float weights. Activations are rounded to levels of 0 to 1 behind ReLUs, which is what ``prepare`` does (of the GRU,
which has none, the weights alone are quantised), or to levels of learned ranges in front of every quantised layer
(``learned_ranges=True``), also with bias correction of the weights. Accuracies are PyTorch's at every width from 8 to
1, trained for or not; files are exported and verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx
import torch
from torch import nn

from experiments.data import Data, digits, shifted
from experiments.networks import recurrent, transformer
from experiments.results import in_parallel, options, spread, write_json
from experiments.training import Recipe, accuracy, train
from tqexport import CheckpointInfo, Scheme, TruncModel, at_width, prepare
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.runtime_file import merge_onnx
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.errors import TqExportError
from tqexport.training.ranges import ranges_of
from tqexport.truncation import FLOAT_BITS, WIDTHS
from tqexport.verification.comparison import compare

TRAINED = (1, 2, 4, 8)
NETWORKS: dict[str, Callable[[], nn.Module]] = {"transformer": transformer, "GRU": recurrent}


LEARNED, CORRECTED = "learned ranges", "learned ranges, bias correction"
WAYS = ("float", "weights alone", "0 to 1", LEARNED, CORRECTED)
LEFT_OUT = {("transformer", "weights alone"), ("GRU", "0 to 1")}  # a GRU has no ReLU to round behind


@dataclass(frozen=True)
class Job:
    """One network to train."""

    network: str
    way: str
    seed: int
    epochs: int


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        shares: Accuracy on held-out samples by width.
        ranges: What was learned, by activation.
        gains: Accuracy that is won at 2 bits where one activation is not rounded, by activation.
        files: What came of exported files, by format.
    """

    shares: Mapping[int, float]
    ranges: Mapping[str, float]
    gains: Mapping[str, float]
    files: Mapping[str, str]


def jobs(seeds: int, epochs: int) -> list[Job]:
    """Every run, seed by seed."""
    every = [(network, way) for network in NETWORKS for way in WAYS if (network, way) not in LEFT_OUT]
    return [Job(*each, seed, epochs) for seed in range(seeds) for each in every]


def run(job: Job) -> Outcome:
    """Train and measure."""
    torch.manual_seed(job.seed)
    data = digits(job.seed)
    network = train(NETWORKS[job.network](), data, (FLOAT_BITS,), job.epochs, job.seed, augment=shifted)
    if job.way == "float":
        train(network, data, (FLOAT_BITS,), job.epochs, job.seed + 1, augment=shifted)
        return Outcome({FLOAT_BITS: accuracy(network, data, FLOAT_BITS)}, {}, {}, {})
    scheme = Scheme(bias_correction=job.way == CORRECTED)
    network = prepare(network, WIDTHS, learned_ranges=job.way in (LEARNED, CORRECTED), scheme=scheme)
    train(network, data, TRAINED, job.epochs, job.seed + 1, Recipe(scheme), shifted)
    shares = {bits: accuracy(network, data, bits) for bits in reversed(WIDTHS)}
    ranges = {name: float(quantizer.range.detach().abs()) for name, quantizer in ranges_of(network).items()}
    gains = _gains(network, data, 2)
    if job.seed or job.way not in (LEARNED, CORRECTED):
        return Outcome(shares, ranges, gains, {})
    model = TruncModel(network.eval(), CheckpointInfo("experiment", {}, (1, 8, 8), WIDTHS, scheme))
    return Outcome(shares, ranges, gains, _verified(model, data.test_x[:64]))


def _gains(network: nn.Module, data: Data, bits: int) -> dict[str, float]:
    """Accuracy that is won at a width where one activation is not rounded."""
    before, gains = accuracy(network, data, bits), {}
    for name, quantizer in ranges_of(network).items():
        with torch.no_grad(), at_width(network, bits):
            quantizer.bits = FLOAT_BITS
            gains[name] = float((network(data.test_x).argmax(1) == data.test_y).float().mean()) - before
    return gains


def _verified(model: TruncModel, samples: torch.Tensor) -> dict[str, str]:
    """Whether the exported files of the widths trained for, fixed and run-time ones, equal PyTorch."""
    inputs, said = samples.numpy(), {}
    try:
        fixed = dict(export_onnx(model, TRAINED))
        files = {"ONNX": (fixed, merge_onnx(fixed.items()))}
        runtime, converted = convert_to_runtime_tflite([onnx.load_from_string(each) for each in fixed.values()])
        files["TFLite"] = (converted, runtime)
    except TqExportError as error:
        return {"refused": str(error)}
    for kind, (by_width, in_one) in files.items():
        runs = [(bits, run_file(content, inputs)) for bits, content in by_width.items()]
        runs += [(bits, run_file(in_one, inputs, bits=bits)) for bits in by_width]
        verdicts = [compare(model, bits, found, inputs) for bits, found in runs]
        problems = [problem for verdict in verdicts for problem in verdict.problems]
        flips = sum(verdict.flips for verdict in verdicts)
        said[kind] = (
            f"differs: {problems[0]}"
            if problems
            else f"{len(by_width)} fixed files and one run-time file equal to PyTorch, {flips} flips"
        )
    return said


def collect(runs: Sequence[tuple[Job, Outcome]]) -> dict[str, Any]:
    """By network: accuracy over seeds by way and width; of the first seed, the ranges learned and what files were."""
    table: dict[str, Any] = {"accuracy_percent": {}, "ranges": {}, "gains_percent": {}, "files": {}}
    for network, way in dict.fromkeys((job.network, job.way) for job, _ in runs):
        outcomes = [outcome for job, outcome in runs if (job.network, job.way) == (network, way)]
        cells = {str(bits): spread(outcome.shares[bits] for outcome in outcomes) for bits in outcomes[0].shares}
        table["accuracy_percent"].setdefault(network, {})[way] = cells
        if way == LEARNED:
            table["ranges"][network] = {name: round(size, 4) for name, size in outcomes[0].ranges.items()}
            gains = {name: spread(outcome.gains[name] for outcome in outcomes) for name in outcomes[0].gains}
            table["gains_percent"][network] = gains
        if outcomes[0].files:
            table["files"][f"{network}, {way}"] = outcomes[0].files
    return table


def draw(table: Mapping[str, Any], path: Path) -> None:
    """One panel per network: accuracy by width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(table["accuracy_percent"]), sharey=True)
    for axes, (network, ways) in zip(panels, table["accuracy_percent"].items(), strict=True):
        for colour, way in enumerate(WAYS):
            cells = ways.get(way, {})
            if way == "float":
                axes.axhline(cells[str(FLOAT_BITS)]["mean"], color="black", ls=":", lw=1, label=way)
            elif cells:
                means = [cells[str(bits)]["mean"] for bits in WIDTHS]
                axes.plot(WIDTHS, means, "o-", color=f"C{colour}", lw=1.3, label=way)
        axes.set_title(network, fontsize=10)
        axes.set_xlabel("bits")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("held-out accuracy, %")
    figure.savefig(path, dpi=130)


@click.command()
@options(seeds=5)
def main(seeds: int, epochs: int, workers: int, folder: Path) -> None:
    """Train, measure and draw."""
    every = jobs(seeds, epochs)
    table = collect(list(zip(every, in_parallel(run, every, workers), strict=True)))
    write_json(folder / "learned_ranges.json", {"seeds": seeds, "epochs": epochs, **table})
    draw(table, folder / "learned_ranges.png")


if __name__ == "__main__":
    main()
