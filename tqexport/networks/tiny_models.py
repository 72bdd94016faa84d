"""The four networks of the MLPerf Tiny benchmark (https://github.com/mlcommons/tiny), truncation-ready."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tqexport.training.preparation import prepare

__all__ = ["TINY_ARCHITECTURES", "autoencoder", "ds_cnn", "mobilenet", "resnet8"]

Widths = Sequence[int]


def _prepared(network: nn.Module, widths: Widths, quantize_all: bool) -> nn.Module:
    return prepare(network, widths, float_layers=() if quantize_all else None)


def _conv_block(
    in_channels: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, groups: int = 1
) -> nn.Sequential:
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _separable_block(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    depthwise = _conv_block(in_channels, in_channels, 3, stride, groups=in_channels)
    return nn.Sequential(depthwise, _conv_block(in_channels, channels, 1))


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
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
    widths: Widths = (1, 2, 4, 8),
    quantize_all: bool = False,
) -> nn.Module:
    """ResNet-8 for image classification. Input (N, in_channels, H, W), published for (N, 3, 32, 32).

    Args:
        in_channels: Channels of the input.
        num_classes: Rows of the classifier.
        width: Channels of the first block; the others have 2x and 4x.
        widths: The bit widths that have a BatchNorm.
        quantize_all: Quantise the first and the last layer too, which otherwise stay float32.
    """
    return _prepared(_ResNet8(in_channels, num_classes, width), widths, quantize_all)


def mobilenet(
    in_channels: int = 3,
    num_classes: int = 2,
    width: int = 8,
    widths: Widths = (1, 2, 4, 8),
    quantize_all: bool = False,
) -> nn.Module:
    """MobileNetV1 for visual wake words; ``width`` 8 is its 0.25. Input (N, 3, 96, 96), output (N, num_classes).

    Args: see :func:`resnet8`; ``width`` is the number of channels of the first convolution.
    """
    plan = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *[(16, 1)] * 5, (32, 2), (32, 1))
    blocks = [_conv_block(in_channels, width, 3, 2)]
    channels = width
    for multiple, stride in plan:
        blocks.append(_separable_block(channels, width * multiple, stride))
        channels = width * multiple
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return _prepared(nn.Sequential(*blocks, classifier), widths, quantize_all)


def ds_cnn(
    in_channels: int = 1,
    num_classes: int = 12,
    width: int = 64,
    widths: Widths = (1, 2, 4, 8),
    quantize_all: bool = False,
) -> nn.Module:
    """DS-CNN for keyword spotting. Input (N, 1, 49, 10): frames by coefficients; output (N, num_classes).

    Args: see :func:`resnet8`; ``width`` is the number of channels of every convolution.
    """
    first = _conv_block(in_channels, width, (10, 4), 2)
    blocks = [_separable_block(width, width) for _ in range(4)]
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    return _prepared(nn.Sequential(first, *blocks, classifier), widths, quantize_all)


def autoencoder(
    size: int = 640, hidden: int = 128, code: int = 8, widths: Widths = (1, 2, 4, 8), quantize_all: bool = False
) -> nn.Module:
    """The fully connected autoencoder for anomaly detection. Input and output (N, size).

    Args:
        size: Values of one sample.
        hidden: Width of the eight hidden layers.
        code: Width of the middle.
        widths: The bit widths that have a BatchNorm.
        quantize_all: Quantise the first and the last layer too, which otherwise stay float32.
    """
    sizes = (size, *[hidden] * 4, code, *[hidden] * 4)
    blocks = [
        nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU())
        for before, after in itertools.pairwise(sizes)
    ]
    return _prepared(nn.Sequential(*blocks, nn.Linear(hidden, size)), widths, quantize_all)


TINY_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "autoencoder": autoencoder,
    "ds_cnn": ds_cnn,
    "mobilenet": mobilenet,
    "resnet8": resnet8,
}
