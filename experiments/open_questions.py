"""What the paper leaves open, as far as small networks can answer it.

python -m experiments.open_questions    writes open_questions.json and open_questions.png

* Recipes: does the scaled estimator, distillation, or the alignment loss help? ResNet-8 on digits; what an ordinary
  network does without them is in robustness.json.
* Activations: can 8-bit activation codes be shifted too, rounded or floored? ResNet-8 on digits.
* Networks: does it hold for a 1-D convolutional network (signals of a formula) and a transformer (rows of digits)?

All are trained jointly at 1, 2, 4 and 8 bits and measured in PyTorch, quantised to the width and with 8-bit codes
shifted; the networks are also exported and verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from experiments.data import Data, digits, shifted, waves
from experiments.networks import CodedActivation, conv1d, transformer, with_coded_activations
from experiments.results import in_parallel, options, spread, write_json
from experiments.training import Augmentation, Recipe, accuracy, train
from tqexport import CheckpointInfo, Scheme, TruncModel, prepare
from tqexport.analysis.gap import measure_gap
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.running import RuntimeRun
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.errors import TqExportError
from tqexport.networks.tiny_models import resnet8
from tqexport.truncation import FLOAT_BITS
from tqexport.verification.comparison import compare

WIDTHS = (1, 2, 4, 8)
ROUNDED = Scheme("dorefa")
RECIPES = {
    "TruncQuant": Recipe(),
    "TruncQuant, scaled estimator": Recipe(estimator="scaled"),
    "TruncQuant, distillation 0.5": Recipe(distillation=0.5),
    "TruncQuant, alignment 0.1": Recipe(alignment=0.1),
    "ordinary, alignment 0.1": Recipe(ROUNDED, alignment=0.1),
}
FLOORED = "TruncQuant, floored activations"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Data], Augmentation | None]] = {
    "1-D convolutional": (conv1d, waves, None),
    "transformer": (transformer, digits, shifted),
}
WEIGHTS = {"float": None, "TruncQuant": Scheme(), "ordinary": ROUNDED}

Shares = dict[str, dict[int, float]]  # by how it is deployed, and by width


@dataclass(frozen=True)
class Job:
    """One network to train: a recipe for ResNet-8, or a network and how its weights are quantised."""

    name: str
    seed: int
    epochs: int
    network: str = ""


@dataclass(frozen=True)
class Outcome:
    """Accuracies on held-out samples, and for exported networks what came of it by format."""

    shares: Shares
    files: Mapping[str, str]


def jobs(seeds: int, epochs: int) -> list[Job]:
    """Every run, seed by seed."""
    every = []
    for seed in range(seeds):
        every += [Job(name, seed, epochs) for name in (*RECIPES, FLOORED)]
        every += [Job(weights, seed, epochs, name) for name in NETWORKS for weights in WEIGHTS]
    return every


def run(job: Job) -> Outcome:
    """Train and measure."""
    torch.manual_seed(job.seed)
    if job.network:
        return _run_network(job)
    data = digits(job.seed)
    network = resnet8(1, 10, 16, widths=WIDTHS)
    if job.name == FLOORED:
        with_coded_activations(network, "truncquant")
    recipe = RECIPES.get(job.name, Recipe())
    train(network, data, WIDTHS, job.epochs, job.seed, recipe, shifted)
    if job.name == FLOORED:
        return Outcome(_activation_shares(network, data), {})
    shares = _weight_shares(_model(network, data, recipe.scheme), data)
    if job.name == "TruncQuant":
        with_coded_activations(network, "dorefa")
        shares |= _activation_shares(network, data)
    return Outcome(shares, {})


def _run_network(job: Job) -> Outcome:
    build, load, augment = NETWORKS[job.network]
    data, scheme = load(job.seed), WEIGHTS[job.name]
    if scheme is None:
        network = train(build(), data, (FLOAT_BITS,), job.epochs, job.seed, augment=augment)
        return Outcome({"float": {FLOAT_BITS: accuracy(network, data, FLOAT_BITS)}}, {})
    network = prepare(build(), WIDTHS)
    train(network, data, WIDTHS, job.epochs, job.seed, Recipe(scheme), augment)
    model = _model(network, data, scheme)
    return Outcome(_weight_shares(model, data), _verified(model, data) if job.seed == 0 else {})


def _model(network: nn.Module, data: Data, scheme: Scheme) -> TruncModel:
    return TruncModel(network, CheckpointInfo("experiment", {}, tuple(data.test_x.shape[1:]), WIDTHS, scheme))


def _weight_shares(model: TruncModel, data: Data) -> Shares:
    gap = measure_gap(model, WIDTHS, (data.test_x.numpy(),), data.test_y.numpy())
    measured = {width.bits: width.accuracy for width in gap.widths}
    return {
        "quantised": {bits: found.quantized or 0.0 for bits, found in measured.items() if found},
        "truncated": {bits: found.truncated or 0.0 for bits, found in measured.items() if found},
    }


def _activation_shares(network: nn.Module, data: Data) -> Shares:
    """Activations quantised to the width, and 8-bit activation codes shifted; the weights shifted both times."""
    shares: Shares = {}
    for stored, name in ((False, "activations quantised"), (True, "activations truncated")):
        for module in network.modules():
            if isinstance(module, CodedActivation):
                module.stored = stored
        shares[name] = {bits: accuracy(network, data, bits) for bits in WIDTHS}
    return shares


def _verified(model: TruncModel, data: Data) -> dict[str, str]:
    """Whether the exported files of every width equal PyTorch, or what stood in the way."""
    inputs = data.test_x[:64].numpy()
    said = {}
    try:
        files = [content for _, content in export_onnx(model, WIDTHS)]
        said["ONNX"] = _verdict(model, [run_file(content, inputs) for content in files], inputs)
        converted = convert_to_tflite([onnx.load_from_string(content) for content in files])
        said["TFLite"] = _verdict(model, [run_file(content, inputs) for content in converted], inputs)
    except TqExportError as error:
        said["ONNX" if "ONNX" not in said else "TFLite"] = f"refused: {error}"
    return said


def _verdict(model: TruncModel, runs: Sequence[RuntimeRun], inputs: npt.NDArray[np.float32]) -> str:
    verdicts = [compare(model, bits, found, inputs) for bits, found in zip(WIDTHS, runs, strict=True)]
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    return f"differs: {problems[0]}" if problems else f"equal to PyTorch at {len(verdicts)} widths"


def collect(runs: Sequence[tuple[Job, Outcome]]) -> dict[str, Any]:
    """By question, network or recipe, deployment and width: accuracy over seeds."""
    table: dict[str, Any] = {"recipes": {}, "activations": {}, "networks": {}, "files": {}}
    for name, network in dict.fromkeys((job.name, job.network) for job, _ in runs):
        outcomes = [outcome for job, outcome in runs if (job.name, job.network) == (name, network)]
        for deployed, widths in outcomes[0].shares.items():
            cells = {str(b): spread(outcome.shares[deployed][b] for outcome in outcomes) for b in widths}
            question = "activations" if deployed.startswith("activations") else "networks" if network else "recipes"
            title = f"{network}, {name}" if network else name
            table[question].setdefault(title, {})[deployed.removeprefix("activations ")] = cells
        table["files"] |= {f"{network}, {name}": outcome.files for outcome in outcomes if outcome.files}
    return table


def draw(table: Mapping[str, Any], path: Path) -> None:
    """One panel per question: accuracy by width, quantised (solid) and truncated (dashed)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    for axes, question in zip(figure.subplots(1, 3), ("recipes", "activations", "networks"), strict=True):
        for colour, (name, ways) in enumerate(table[question].items()):
            for deployed, cells in ways.items():
                if deployed == "float":
                    axes.axhline(cells[str(FLOAT_BITS)]["mean"], color=f"C{colour}", ls=":", lw=1, label=name)
                    continue
                style = "o-" if deployed == "quantised" else "x--"
                label = name if deployed == "quantised" else None
                axes.plot(list(cells), [cell["mean"] for cell in cells.values()], style, color=f"C{colour}",
                          lw=1.3, label=label)  # fmt: skip
        axes.set_title(f"{question}: quantised (solid), truncated (dashed)", fontsize=10)
        axes.set_xlabel("bits")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("held-out accuracy, %")
    figure.savefig(path, dpi=130)


@click.command()
@options(seeds=3)
def main(seeds: int, epochs: int, workers: int, folder: Path) -> None:
    """Train, measure and draw."""
    every = jobs(seeds, epochs)
    table = collect(list(zip(every, in_parallel(run, every, workers), strict=True)))
    write_json(folder / "open_questions.json", {"seeds": seeds, "epochs": epochs, "accuracy_percent": table})
    draw(table, folder / "open_questions.png")


if __name__ == "__main__":
    main()
