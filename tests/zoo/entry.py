"""An entry of the zoo, and the frame that most of its networks stand in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tqexport import InputInfo

__all__ = ["EXACT", "Apply", "Entry", "Framed"]

EXACT = "exact"
PICTURE = (InputInfo("input", (3, 16, 16)),)


@dataclass(frozen=True)
class Entry:
    """A network, and what is expected of it.

    Attributes:
        name: In a few words, what it has that others have not.
        build: Makes the float network.
        inputs: What it takes.
        onnx: ``exact``, or words of the sentence that refuses it.
        tflite: The same.
        float_layers: Names of the layers that stay in float; None for the first and the last.
        learned_ranges: Whether the ranges of its activations are learned.
        rewritten: Whether verify takes its ONNX file behind onnxsim.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[InputInfo, ...] = PICTURE
    onnx: str = EXACT
    tflite: str = EXACT
    float_layers: tuple[str, ...] | None = None
    learned_ranges: bool = False
    rewritten: bool = True


class Framed(nn.Module):
    """A float convolution, what is to be tried, a quantised convolution, and a float linear layer."""

    def __init__(self, inner: nn.Module, channels: int = 8, stride: int = 1) -> None:
        """Put ``inner``, which takes (N, 8, H, W) and gives (N, channels, H', W'), in the frame."""
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 8, 3, stride, padding=1), inner
        self.second, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Linear(8, 4)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act2(self.second(self.inner(self.act(self.first(x))))).mean((2, 3)))


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)
