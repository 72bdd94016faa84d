"""Small networks that hold every kind of layer with an integer form."""

from __future__ import annotations

import numpy as np
import torch
from networks import randomize_
from torch import Tensor, nn

from tqexport import CheckpointInfo, TruncModel, prepare
from tqexport.integer.calibration import calibrate
from tqexport.networks.registry import ARCHITECTURES

__all__ = ["CASES", "WIDTHS", "Shortcuts", "calibrated_case"]

WIDTHS = (1, 2, 4, 8)


class Branches(nn.Module):
    """Concatenation, dilation and groups, a maximum with padding, an average over windows, and a flatten of space."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.second = nn.Conv2d(8, 8, 3, padding=(2, 1), dilation=(2, 1), groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.maximum = nn.MaxPool2d(3, stride=1, padding=1)
        self.average = nn.AvgPool2d(2, padding=1)
        self.third, self.norm3 = nn.Conv2d(16, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        self.drop, self.last = nn.Dropout(), nn.Linear(12 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        y = self.act(self.norm(self.second(x)))
        z = self.average(torch.cat([self.maximum(y), x], 1))
        return self.last(self.drop(self.act(self.norm3(self.third(z)))).flatten(1))


class OneAxis(nn.Module):
    """Convolutions over one axis, depthwise too, and a sum that nothing rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Conv1d(4, 8, 5, padding=2), nn.ReLU()
        self.second, self.norm = nn.Conv1d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm1d(8)
        self.third, self.norm3, self.last = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.second(self.act(self.first(x)))))
        x = x + self.norm3(self.third(x))
        return self.last(x.mean(2))


class Shortcuts(nn.Module):
    """Sums of what grouped and depthwise layers give, below zero too; values joined twice and on other grids."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU()
        self.grouped, self.norm = nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.last = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        y = self.norm(self.grouped(x)) + x
        z = self.norm2(self.depthwise(x)) + x
        return self.last(torch.cat([x, x, y, z], 1).mean((2, 3)))


CASES = {
    "autoencoder": (lambda: ARCHITECTURES["autoencoder"](size=32, hidden=16, widths=WIDTHS), (32,)),
    "ds_cnn": (lambda: ARCHITECTURES["ds_cnn"](width=8, widths=WIDTHS), (1, 49, 10)),
    "mobilenet": (lambda: ARCHITECTURES["mobilenet"](width=4, widths=WIDTHS), (3, 32, 32)),
    "resnet8": (lambda: ARCHITECTURES["resnet8"](width=4, widths=WIDTHS, quantize_all=True), (3, 16, 16)),
    "resnet20q": (lambda: ARCHITECTURES["resnet20q"](widths=WIDTHS), (3, 16, 16)),
    "resnet50q": (lambda: ARCHITECTURES["resnet50q"](planes=2, widths=WIDTHS, num_classes=4), (3, 32, 32)),
    "svhnq": (lambda: ARCHITECTURES["svhnq"](expansion=1, widths=WIDTHS), (3, 40, 40)),
    "preresnet18q": (lambda: ARCHITECTURES["preresnet18q"](planes=2, widths=WIDTHS, num_classes=4), (3, 193, 193)),
    "branches": (lambda: prepare(Branches(), WIDTHS), (3, 8, 8)),
    "shortcuts": (lambda: prepare(Shortcuts(), WIDTHS), (3, 9, 8)),
    "one axis": (lambda: prepare(OneAxis(), WIDTHS), (4, 16)),
}


def calibrated_case(name: str) -> tuple[TruncModel, np.ndarray]:
    """One of the networks, random and calibrated, with the samples that it was calibrated on."""
    make, shape = CASES[name]
    model = TruncModel(randomize_(make(), 1), CheckpointInfo(name, {}, shape, WIDTHS))
    inputs = np.random.default_rng(0).normal(size=(16, *shape)).astype(np.float32)
    return calibrate(model, inputs), inputs
