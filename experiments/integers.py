"""What integers from end to end cost, from the files: accuracy before grids, with grids, and trained on with grids.

python -m experiments.integers    writes integers.json

A ResNet-8 per seed on digits, trained jointly at 1, 2, 4 and 8 bits. Its exact ONNX files have float joins; grids are
found from the training samples; and the network with grids trains on for some epochs. Accuracies are those of held-out
digits in the ONNX files, exact and of the integer kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from experiments.data import Data, digits, shifted
from experiments.results import in_parallel, options, spread, write_json
from experiments.training import BATCH, train
from tqexport import CheckpointInfo, TruncModel, joint_backward
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.session import OnnxSession
from tqexport.integer.calibration import calibrate
from tqexport.networks.tiny_models import resnet8

WIDTHS = (1, 2, 4, 8)
EXACT, CALIBRATED, TRAINED_ON = "float joins", "grids found", "trained on with grids"
WAYS = (EXACT, CALIBRATED, TRAINED_ON)
MORE_EPOCHS, RATE = 12, 5e-4


@dataclass(frozen=True)
class Job:
    """One seed."""

    seed: int
    epochs: int


Shares = dict[str, dict[int, float]]  # by way and width


def run(job: Job) -> Shares:
    """Train a network, write its files in each way, and read the accuracies from them."""
    data = digits(job.seed)
    torch.manual_seed(job.seed)
    network = resnet8(1, 10, 16, widths=WIDTHS)
    train(network, data, WIDTHS, job.epochs, job.seed, augment=shifted)
    model = TruncModel(network, CheckpointInfo("resnet8", {}, (1, 8, 8), WIDTHS))
    calibrated = calibrate(model, data.train_x.numpy())
    shares = {
        EXACT: _accuracies(export_onnx(model, WIDTHS), data),
        CALIBRATED: _accuracies(((bits, integer_onnx(calibrated, bits)) for bits in WIDTHS), data),
    }
    trained_on = _trained_on(calibrated, data, job.seed)  # which trains the calibrated network in place
    shares[TRAINED_ON] = _accuracies(((bits, integer_onnx(trained_on, bits)) for bits in WIDTHS), data)
    return shares


def _trained_on(model: TruncModel, data: Data, seed: int) -> TruncModel:
    """A calibrated network after some more epochs, its grids found again after each."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(MORE_EPOCHS):
        rate = RATE * (1 - epoch / MORE_EPOCHS)
        optimizer = torch.optim.AdamW(model.module.parameters(), lr=rate, weight_decay=1e-4)
        model.module.train()
        batches = torch.randperm(len(data.train_x), generator=generator).split(BATCH)
        for batch in batches[: len(data.train_x) // BATCH]:
            optimizer.zero_grad()
            inputs = shifted(data.train_x[batch], generator)
            joint_backward(model.module, inputs, data.train_y[batch], WIDTHS, nn.functional.cross_entropy)
            optimizer.step()
        model = calibrate(model, data.train_x.numpy())
    return model


def _accuracies(files: Iterable[tuple[int, bytes]], data: Data) -> dict[int, float]:
    """Share of the held-out samples that the file of each width classifies right."""
    inputs, labels = data.test_x.numpy(), data.test_y.numpy()
    return {bits: float((OnnxSession(file).run((inputs,))[0].argmax(1) == labels).mean()) for bits, file in files}


def collect(runs: Sequence[Shares]) -> dict[str, Any]:
    """By way and width: accuracy over seeds, and the difference to the files with float joins, in points."""
    accuracy = {way: {str(bits): spread(one[way][bits] for one in runs) for bits in WIDTHS} for way in WAYS}
    difference = {
        way: {str(bits): spread(one[way][bits] - one[EXACT][bits] for one in runs) for bits in WIDTHS}
        for way in (CALIBRATED, TRAINED_ON)
    }
    return {"accuracy_percent": accuracy, "points_against_float_joins": difference}


@click.command()
@options(seeds=5)
def main(seeds: int, epochs: int, workers: int, folder: Path) -> None:
    """Train, calibrate, export and measure."""
    runs = list(in_parallel(run, [Job(seed, epochs) for seed in range(seeds)], workers))
    content = {"seeds": seeds, "epochs": epochs, "more_epochs": MORE_EPOCHS, **collect(runs)}
    write_json(folder / "integers.json", content)
    for way in WAYS:
        cells = content["accuracy_percent"][way]
        print(
            way, *(f"{bits}: {cells[str(bits)]['mean']:.1f} ± {cells[str(bits)]['deviation']:.1f}" for bits in WIDTHS)
        )


if __name__ == "__main__":
    main()
