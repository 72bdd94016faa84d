"""One operator at a time between two convolutions: norms, activations, padding, pooling, resampling, and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from entry import Apply, Entry, Framed
from torch import Tensor, nn
from torch.nn import functional


def applied(name: str, function: Callable[[Tensor], Tensor], channels: int = 8, **expected: Any) -> Entry:
    """A function in the frame."""
    return Entry(name, lambda: Framed(Apply(function), channels), **expected)


def module(name: str, make: Callable[[], nn.Module], channels: int = 8, **expected: str) -> Entry:
    """A module in the frame."""
    return Entry(name, lambda: Framed(make(), channels), **expected)


TABLE = torch.linspace(-1, 1, 8 * 16 * 16).reshape(8, 16, 16)


class Padded(nn.Module):
    """A quantised convolution that pads otherwise than with zeros."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def top_k(x: Tensor) -> Tensor:
    """The four largest values of each row."""
    return x.topk(4, 3).values


def unfold(x: Tensor) -> Tensor:
    """Windows of 2x2 as channels."""
    n, c, h, w = x.shape
    return functional.unfold(x, 2, stride=2).reshape(n, c * 4, h // 2, w // 2)


def fold(x: Tensor) -> Tensor:
    """Blocks taken apart, each scaled by its place, and put together again."""
    blocks = functional.unfold(x, 2, stride=2)
    return functional.fold(blocks * torch.linspace(0.5, 1.5, blocks.shape[2]), x.shape[2:], 2, stride=2)


def grid_sample(x: Tensor) -> Tensor:
    """The picture turned by a fixed angle."""
    turn = torch.tensor([[[0.8, -0.6, 0.0], [0.6, 0.8, 0.0]]]).expand(x.shape[0], 2, 3)
    return functional.grid_sample(
        x, functional.affine_grid(turn, [x.shape[0], *x.shape[1:]], align_corners=False), align_corners=False
    )


ENTRIES = [
    module("GroupNorm", lambda: nn.GroupNorm(2, 8)),
    module("InstanceNorm", lambda: nn.InstanceNorm2d(8, affine=True)),
    module("LayerNorm over three axes", lambda: nn.LayerNorm((8, 16, 16))),
    module("PReLU", lambda: nn.PReLU(8)),
    module("SiLU", nn.SiLU),
    module("Mish", nn.Mish),
    module("GELU", nn.GELU),
    module("ELU", nn.ELU),
    module("LeakyReLU", nn.LeakyReLU),
    module("Softplus", nn.Softplus),
    module("reflection padding", lambda: nn.ReflectionPad2d(2)),
    module("replication padding", lambda: nn.ReplicationPad2d(2)),
    module("circular padding", lambda: nn.CircularPad2d(2)),
    module("a layer with reflection padding", lambda: Padded("reflect")),
    module("a layer with circular padding", lambda: Padded("circular")),
    module("max pooling with ceil_mode", lambda: nn.MaxPool2d(3, 2, ceil_mode=True)),
    module("average pooling with ceil_mode", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    module("average pooling without padding counted", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    module("average pooling with both", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
    module("adaptive pooling to 5x5", lambda: nn.AdaptiveAvgPool2d(5)),
    applied("nearest, twice the size", lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest")),
    applied("bilinear, twice the size", lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear")),
    applied(
        "bilinear with aligned corners",
        lambda x: functional.interpolate(x, size=(24, 20), mode="bilinear", align_corners=True),
    ),
    applied(
        "bicubic, twice the size",
        lambda x: functional.interpolate(x, scale_factor=2.0, mode="bicubic"),
    ),
    applied("nearest to another shape", lambda x: functional.interpolate(x, size=(24, 20), mode="nearest")),
    applied("einsum", lambda x: torch.einsum("nchw,ncdw->nchd", x, x) / 16),
    applied("cumulative sum", lambda x: x.cumsum(3) / 8),
    applied("top-k", top_k),
    applied("roll", lambda x: x.roll((1, 2), (2, 3))),
    applied("flip", lambda x: x.flip(3)),
    applied("unfold", unfold, 32),
    applied("fold", fold),
    applied("grid sample", grid_sample),
    applied("softmax over space", lambda x: x.flatten(2).softmax(2).reshape(x.shape) * 64, rewritten=False),
    applied("pixel unshuffle", lambda x: functional.pixel_unshuffle(x, 2), 32),
    applied("a table per place", lambda x: torch.maximum(x, TABLE) * TABLE),
    applied("where", lambda x: torch.where(x > 0.3, x, x * x)),
    applied("response norm of channels", lambda x: x * x.norm(dim=(2, 3), keepdim=True) / 16),
    applied("normalised vectors", lambda x: functional.normalize(x, dim=1)),
]
