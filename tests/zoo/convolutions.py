"""Convolutional networks in the shapes that architectures are made of."""

from __future__ import annotations

import torch
from entry import Entry, Framed
from torch import Tensor, nn
from torch.nn import functional

from tqexport import InputInfo

SERIES, VECTOR = (InputInfo("input", (4, 32)),), (InputInfo("input", (24,)),)


def conv(
    inputs: int, outputs: int, kernel: int = 3, *, act: type[nn.Module] = nn.ReLU, **options: int
) -> nn.Sequential:
    """Convolution, BatchNorm and activation."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), act())


def classifier(*layers: nn.Module, channels: int, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(inputs, outputs, stride=stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.act, self.short = nn.ReLU(), nn.Identity()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.short(x))


class Exchange(nn.Module):
    """Branches at three resolutions, each of which takes from all of them, as in HRNet."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = nn.ReLU(), nn.Linear(24, 4)
        self.start, self.down = conv(3, 8), nn.ModuleList([conv(8, 8, stride=2), conv(8, 8, stride=2)])
        self.branches, self.ends = (
            nn.ModuleList([nn.Sequential(conv(8, 8), conv(8, 8)) for _ in range(3)]) for _ in range(2)
        )
        self.lower = nn.ModuleList([nn.Conv2d(8, 8, 3, 2, 1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        a = self.start(x)
        b = self.down[0](a)
        a, b, c = (branch(value) for branch, value in zip(self.branches, (a, b, self.down[1](b)), strict=True))
        half = self.lower[0](a)
        joined = (
            a + functional.interpolate(b, scale_factor=2) + functional.interpolate(c, scale_factor=4),
            half + b + functional.interpolate(c, scale_factor=2),
            self.lower[1](half) + self.lower[1](b) + c,
        )
        ends = [end(self.act(value)).mean((2, 3)) for end, value in zip(self.ends, joined, strict=True)]
        return self.last(torch.cat(ends, 1))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, projection without activation."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        wide = 3 * channels
        self.body = nn.Sequential(
            conv(channels, wide, 1, act=act),
            conv(wide, wide, 3, act=act, groups=wide),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """Every layer reads what all before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class SqueezeExcite(nn.Module):
    """Channels scaled by what the whole picture says."""

    def __init__(self, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), gate())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class UNet(nn.Module):
    """Down, up, and joined with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.down = conv(3, 8), nn.Sequential(nn.MaxPool2d(2), conv(8, 16))
        self.up, self.after, self.head = nn.ConvTranspose2d(16, 8, 2, 2), conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.head(self.after(torch.cat([x, self.up(self.down(x))], 1)))


class Yolo(nn.Module):
    """Heads at two scales, each as (N, boxes, numbers)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Sequential(conv(3, 8, stride=2), conv(8, 8)), conv(8, 16, stride=2)
        self.joined = conv(24, 8)
        self.heads = nn.ModuleList([nn.Conv2d(8, 12, 1), nn.Conv2d(16, 12, 1)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        fine = self.joined(torch.cat([fine, functional.interpolate(coarse, scale_factor=2.0)], 1))
        outputs = [head(value) for head, value in zip(self.heads, (fine, coarse), strict=True)]
        boxes = [value.reshape(-1, 2, 6, value.shape[2] * value.shape[3]).transpose(2, 3) for value in outputs]
        return {"fine": boxes[0].flatten(1, 2).sigmoid(), "coarse": boxes[1].flatten(1, 2).sigmoid()}


class Shuffle(nn.Module):
    """Grouped convolutions with their channels mixed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = conv(8, 8, 1, groups=2), conv(8, 8, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        n, c, h, w = x.shape
        return self.after(x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class ConvNeXt(nn.Module):
    """A depthwise convolution, then LayerNorm and linear layers with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8)
        self.wide, self.act, self.narrow = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(self.act(self.wide(y)))).permute(0, 3, 1, 2)


class Branches(nn.Module):
    """Kernels of several shapes side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv(8, 4, 1),
                nn.Sequential(nn.Conv2d(8, 4, (1, 5), padding=(0, 2)), nn.Conv2d(4, 4, (5, 1), padding=(2, 0))),
                nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(8, 4, 1)),
                nn.MaxPool2d(3, 1, 1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.conv(x))))


class Tied(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.two(self.act(self.one(x))))


class Functional(nn.Module):
    """Functions in the place of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = functional.avg_pool2d(self.second(x).relu(), 2, stride=1)[:, :, 1:, 1:]
        return self.last(functional.adaptive_avg_pool2d(x, 3).view(x.size(0), -1))


class Pyramid(nn.Module):
    """Pools of several sizes scaled up again, as in segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(8, 4, 1), nn.ReLU()) for n in (1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        up = [functional.interpolate(scale(x), size=x.shape[2:], mode="bilinear") for scale in self.scales]
        return torch.cat([x, *up], 1)


def temporal() -> nn.Module:
    """Dilated convolutions over time."""
    layers: list[nn.Module] = [nn.Conv1d(4, 8, 3, padding=1), nn.ReLU()]
    for dilation in (2, 4):
        layers += [nn.Conv1d(8, 8, 3, padding=dilation, dilation=dilation), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))


def separable() -> nn.Module:
    """Depthwise and pointwise convolutions over time, as keyword spotting has them."""
    middle = [nn.Conv1d(8, 8, 5, 2, 2, groups=8), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 1), nn.ReLU()]
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), *middle, nn.Flatten(), nn.Linear(180, 4))


def perceptron() -> nn.Module:
    block = [layer for _ in range(2) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), *block, nn.Dropout(), nn.Linear(16, 4))


def autoencoder() -> nn.Module:
    up = [nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(conv(3, 8, stride=2), conv(8, 16, stride=2), *up, nn.ConvTranspose2d(8, 3, 4, 2, 1))


def super_resolution() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(3, 3, 3, padding=1))


ENTRIES = [
    Entry("residual blocks", lambda: classifier(conv(3, 8), Residual(8, 8), Residual(8, 16, 2), channels=16)),
    Entry("grouped residual block", lambda: classifier(conv(3, 8), Residual(8, 16, 2, groups=4), channels=16)),
    Entry("inverted residuals", lambda: classifier(conv(3, 8, stride=2), Inverted(8), Inverted(8), channels=8)),
    Entry("inverted residuals, Hardswish", lambda: classifier(conv(3, 8), Inverted(8, nn.Hardswish), channels=8)),
    Entry("dense connections", lambda: Framed(Dense(), 24)),
    Entry("squeeze and excite", lambda: Framed(SqueezeExcite())),
    Entry("squeeze and excite, Hardsigmoid", lambda: Framed(SqueezeExcite(nn.Hardsigmoid))),
    Entry("U-Net", UNet),
    Entry("heads at two scales, a dict of outputs", Yolo),
    Entry("pixel shuffle", super_resolution),
    Entry("channel shuffle", lambda: Framed(Shuffle())),
    Entry("ConvNeXt block", lambda: Framed(ConvNeXt())),
    Entry("branches of several kernels", lambda: Framed(Branches(), 20)),
    Entry("pyramid pooling", lambda: Framed(Pyramid(), 16)),
    Entry("one module called twice", lambda: Framed(Twice())),
    Entry("two layers with one weight", lambda: Framed(Tied())),
    Entry("functions in the place of modules", Functional),
    Entry("autoencoder", autoencoder),
    Entry("dilated convolutions over time", temporal, SERIES),
    Entry("depthwise convolutions over time", separable, SERIES),
    Entry("perceptron", perceptron, VECTOR),
    Entry("branches at three resolutions", Exchange),
]
