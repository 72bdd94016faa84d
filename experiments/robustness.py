"""Truncation robustness, from the files: what is left of a network's accuracy where its 8-bit codes are shifted.

python -m experiments.robustness    writes robustness.json and robustness.png

Two ResNet-8 per seed on digits, trained jointly at 1, 2, 4 and 8 bits: an ordinary one (``dorefa``) and a TruncQuant
one. Three files of each width and format: the ordinary network quantised to the width (as tqexport exports it), the
ordinary network's 8-bit codes with a shift (which tqexport does not export, see
``tqexport.analysis.gap.deploy_truncated``), and the TruncQuant network, whose files always shift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx
import torch

from experiments.data import Data, digits, shifted
from experiments.results import in_parallel, options, spread, write_json
from experiments.training import Recipe, train
from tqexport import CheckpointInfo, Scheme, TruncModel
from tqexport.analysis.gap import deploy_truncated
from tqexport.backends import run_file
from tqexport.backends.onnx import LAYOUT
from tqexport.backends.onnx.export import capture, export_onnx, render
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.facts import facts_of_model
from tqexport.networks.tiny_models import resnet8
from tqexport.verification.comparison import compare

WIDTHS = (1, 2, 4, 8)
QUANTIZED, TRUNCATED, TRUNCQUANT = "quantised / quantised", "quantised / truncated", "TruncQuant / truncated"
WAYS = (QUANTIZED, TRUNCATED, TRUNCQUANT)  # trained / deployed
SOURCES = ("PyTorch", "ONNX", "TFLite")


@dataclass(frozen=True)
class Job:
    """One seed."""

    seed: int
    epochs: int


@dataclass(frozen=True)
class Row:
    """One network, deployed one way at one width: accuracy by source, and whether the files equal PyTorch."""

    way: str
    bits: int
    accuracy: Mapping[str, float]
    verified: bool | None  # None: of a network that runs otherwise than it was trained there is nothing to verify


def trained(job: Job, data: Data, scheme: Scheme) -> TruncModel:
    """A ResNet-8 trained jointly at all widths."""
    torch.manual_seed(job.seed)
    network = resnet8(1, 10, 16, widths=WIDTHS)
    train(network, data, WIDTHS, job.epochs, job.seed, Recipe(scheme), shifted)
    return TruncModel(network, CheckpointInfo("resnet8", {}, (1, 8, 8), WIDTHS, scheme))


def truncated_onnx(model: TruncModel, bits: int) -> bytes:
    """The ONNX file that shifts a network's 8-bit codes, whatever they were trained for."""
    deployed = deploy_truncated(model, bits)
    return render(capture(deployed, model.info.signature), deployed, facts_of_model(model, bits, LAYOUT))


def run(job: Job) -> list[Row]:
    """Train both networks of a seed, write every file, and read the accuracies from the files."""
    data = digits(job.seed)
    inputs, labels = data.test_x.numpy(), data.test_y.numpy()
    ordinary, truncquant = (trained(job, data, scheme) for scheme in (Scheme("dorefa"), Scheme()))
    files = {
        **{(QUANTIZED, bits): content for bits, content in export_onnx(ordinary, WIDTHS)},
        **{(TRUNCATED, bits): truncated_onnx(ordinary, bits) for bits in WIDTHS},
        **{(TRUNCQUANT, bits): content for bits, content in export_onnx(truncquant, WIDTHS)},
    }
    converted = convert_to_tflite([onnx.load_from_string(content) for content in files.values()])
    rows = []
    for ((way, bits), content), tflite in zip(files.items(), converted, strict=True):
        runs = {"ONNX": run_file(content, inputs), "TFLite": run_file(tflite, inputs)}
        shares = {source: float((found.output.argmax(1) == labels).mean()) for source, found in runs.items()}
        if way == TRUNCATED:
            verified = None
            with torch.no_grad():
                outputs = deploy_truncated(ordinary, bits)(data.test_x)
            shares["PyTorch"] = float((outputs.argmax(1) == data.test_y).float().mean())
        else:
            model = ordinary if way == QUANTIZED else truncquant
            verdicts = [compare(model, bits, found, inputs, labels) for found in runs.values()]
            verified = all(verdict.passed for verdict in verdicts)
            shares["PyTorch"] = verdicts[0].reference_accuracy or 0.0
        rows.append(Row(way, bits, shares, verified))
    return rows


def collect(runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """By way, source and width: accuracy over seeds."""
    rows = [row for seed in runs for row in seed]
    return {
        way: {
            source: {
                str(bits): spread(row.accuracy[source] for row in rows if (row.way, row.bits) == (way, bits))
                for bits in WIDTHS
            }
            for source in SOURCES
        }
        for way in WAYS
    }


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Accuracy from the TFLite files by width, with deviations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for position, way in enumerate(WAYS):
        cells = [table[way]["TFLite"][str(bits)] for bits in WIDTHS]
        places = [i + 0.27 * (position - 1) for i in range(len(WIDTHS))]
        means, deviations = [cell["mean"] for cell in cells], [cell["deviation"] for cell in cells]
        axes.bar(places, means, 0.25, yerr=deviations, capsize=3, label=way)
    axes.set_xticks(range(len(WIDTHS)), [f"{bits} bit{'s' * (bits > 1)}" for bits in WIDTHS])
    axes.set_ylabel("accuracy of the TFLite file, %")
    axes.set_ylim(min(80, *(table[way]["TFLite"][str(b)]["mean"] - 5 for way in WAYS for b in WIDTHS)), 101)
    figure.legend(title="trained / deployed", fontsize=9, loc="outside lower center", ncols=len(WAYS))
    figure.savefig(path, dpi=150)


@click.command()
@options(seeds=4)
def main(seeds: int, epochs: int, workers: int, folder: Path) -> None:
    """Train, export, measure and draw."""
    runs = list(in_parallel(run, [Job(seed, epochs) for seed in range(seeds)], workers))
    table = collect(runs)
    verified = [row.verified for seed in runs for row in seed if row.verified is not None]
    content = {
        "seeds": seeds,
        "epochs": epochs,
        "files_verified": f"{sum(verified)} of {len(verified)} pairs of ONNX and TFLite equal PyTorch",
        "accuracy_percent": table,
    }
    write_json(folder / "robustness.json", content)
    draw(table, folder / "robustness.png")


if __name__ == "__main__":
    main()
