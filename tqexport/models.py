"""Architectures by name. A factory takes plain keyword arguments and returns a prepared network."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from tqexport.errors import UsageError
from tqexport.preparation import prepare
from tqexport.research_models import RESEARCH_ARCHITECTURES

__all__ = ["ARCHITECTURES", "Factory", "find_factory", "resnet8"]

Factory = Callable[..., nn.Module]


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(channels)
        self.act0 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(self.act0(self.bn0(self.conv0(x)))))
        out: Tensor = self.act1(y + self.shortcut(x))
        return out


class _ResNet8(nn.Module):
    """The ResNet-8 of the MLPerf Tiny benchmark: three blocks of two 3x3 convolutions, then a linear layer."""

    def __init__(self, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.layers = nn.Sequential(
            _BasicBlock(width, width, 1), _BasicBlock(width, 2 * width, 2), _BasicBlock(2 * width, 4 * width, 2)
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.act(self.bn(self.conv(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def resnet8(
    in_channels: int = 3, num_classes: int = 10, width: int = 16, widths: Iterable[int] = (1, 2, 4, 8)
) -> nn.Module:
    """ResNet-8 (MLPerf Tiny), first convolution and classifier in float32, the rest truncation-ready.

    Args:
        in_channels: Channels of the input (N, in_channels, H, W).
        num_classes: Rows of the classifier.
        width: Channels of the first block; the others have 2x and 4x.
        widths: The bit widths that have a BatchNorm.
    """
    return prepare(_ResNet8(in_channels, num_classes, width), widths)


ARCHITECTURES: dict[str, Factory] = {"resnet8": resnet8, **RESEARCH_ARCHITECTURES}


def find_factory(architecture: str) -> Factory:
    """The factory of a registered name, or of ``package.module:factory``.

    A dotted factory is imported with the working folder on the path. It must return a prepared network.

    Raises:
        UsageError: The name is not registered, or the module or factory cannot be imported.
    """
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    module_name, colon, attribute = architecture.partition(":")
    if not colon:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UsageError(
            f"unknown architecture {architecture!r}; known are {known}. "
            "Bring your own with --model package.module:factory"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the network factory {architecture!r}: {error}") from error
    if not callable(factory):
        raise UsageError(f"{architecture!r} is not callable; name a function that returns the prepared network")
    result: Factory = factory
    return result
