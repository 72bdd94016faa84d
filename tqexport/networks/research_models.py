"""The networks of the research family, under the keys its checkpoints have.

The first convolution and the classifier are float32 in all of them. No convolution has a bias but the first of svhnq.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from tqexport.checkpoints.recognition import recognize
from tqexport.errors import UsageError
from tqexport.training.layers import SwitchableBatchNorm2d, TruncConv2d
from tqexport.training.quantizers import ActivationQuantizer, Clamp
from tqexport.truncation import FLOAT_BITS

__all__ = ["RESEARCH_ARCHITECTURES", "Variant", "preresnet18q", "recognize", "resnet20q", "resnet50q", "svhnq"]

Variant = Literal["any-precision", "switchable", "shared-bn"]
Widths = Sequence[int] | None

FAMILY_WIDTHS = (1, 2, 4, 8, FLOAT_BITS)


def _norm(channels: int, widths: Widths) -> nn.Module:
    return SwitchableBatchNorm2d(channels, widths) if widths else nn.BatchNorm2d(channels)


def _conv(in_channels: int, channels: int, kernel: int, stride: int = 1, padding: int = 0) -> TruncConv2d:
    return TruncConv2d(in_channels, channels, kernel, stride, padding, bias=False)


def _float_conv(in_channels: int, channels: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)


# resnet20q


class _CifarBlock(nn.Module):
    """Pre-activation basic block; its shortcut convolution, where it has one, starts from the activation."""

    def __init__(self, in_channels: int, channels: int, stride: int, variant: Variant, widths: Widths) -> None:
        super().__init__()
        self.bn0 = _norm(in_channels, widths)
        self.act0 = ActivationQuantizer()
        self.conv0 = _conv(in_channels, channels, 3, stride, padding=1)
        self.bn1 = _norm(channels, widths)
        self.act1 = ActivationQuantizer()
        self.conv1 = _conv(channels, channels, 3, padding=1)
        self.skip_conv: nn.Module | None = None
        self.skip_bn: nn.Module = nn.Identity()
        if stride != 1 and variant == "any-precision":
            self.skip_conv = _float_conv(in_channels, channels, 1, stride)
            self.skip_bn = nn.BatchNorm2d(channels)
        elif stride != 1:
            self.skip_conv = _conv(in_channels, channels, 1, stride)
            self.skip_bn = _norm(channels, widths)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act0(self.bn0(x))
        shortcut = x if self.skip_conv is None else self.skip_bn(self.skip_conv(a))
        out: Tensor = self.conv1(self.act1(self.bn1(self.conv0(a)))) + shortcut
        return out


class _CifarResNet(nn.Module):
    def __init__(self, expansion: int, num_classes: int, variant: Variant, widths: Widths) -> None:
        super().__init__()
        channels = 16 * expansion
        self.conv0 = _float_conv(3, channels, 3, padding=1)
        self.layers = nn.Sequential()
        for index in range(9):
            stride = 2 if index in (3, 6) else 1
            self.layers.append(_CifarBlock(channels, channels * stride, stride, variant, widths))
            channels *= stride
        self.bn = _norm(channels, widths)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.layers(self.conv0(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def resnet20q(
    expansion: int = 1,
    num_classes: int = 10,
    variant: Variant = "any-precision",
    widths: Widths = FAMILY_WIDTHS,
) -> nn.Module:
    """Pre-activation ResNet-20 for CIFAR. Input (N, 3, H, W), naturally 32x32; output (N, num_classes).

    Args:
        expansion: The stages have 16, 32 and 64 times this many channels.
        num_classes: Rows of the classifier.
        variant: ``any-precision``: float shortcut convolutions with plain BatchNorms; ``switchable``: quantised ones
            with a BatchNorm per width; ``shared-bn``: quantised ones, and no BatchNorm per width anywhere.
        widths: The bit widths that have a BatchNorm; none means plain ones, as ``shared-bn`` has in any case.

    Raises:
        UsageError: ``variant`` is none of the three.
    """
    if variant not in get_args(Variant):
        raise UsageError(f"resnet20q has no variant {variant!r}; known are {', '.join(get_args(Variant))}")
    return _CifarResNet(expansion, num_classes, variant, None if variant == "shared-bn" else widths)


# resnet50q


class _Bottleneck(nn.Module):
    """Pre-activation bottleneck; its shortcut convolution, where it has one, starts from the raw input."""

    def __init__(self, in_channels: int, planes: int, stride: int, widths: Widths, shortcut_widths: Widths) -> None:
        super().__init__()
        channels = 4 * planes
        self.bn0 = _norm(in_channels, widths)
        self.act0 = ActivationQuantizer()
        self.conv0 = _conv(in_channels, planes, 1)
        self.bn1 = _norm(planes, widths)
        self.act1 = ActivationQuantizer()
        self.conv1 = _conv(planes, planes, 3, stride, padding=1)
        self.bn2 = _norm(planes, widths)
        self.act2 = ActivationQuantizer()
        self.conv2 = _conv(planes, channels, 1)
        self.downsample = nn.Sequential()  # empty, it passes its input on
        if in_channels != channels:
            self.downsample.append(_float_conv(in_channels, channels, 1, stride))
            self.downsample.append(_norm(channels, shortcut_widths))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(self.act0(self.bn0(x)))
        y = self.conv1(self.act1(self.bn1(y)))
        out: Tensor = self.conv2(self.act2(self.bn2(y))) + self.downsample(x)
        return out


class _ImageNetResNet(nn.Module):
    def __init__(self, num_classes: int, planes: int, widths: Widths, shortcut_widths: Widths) -> None:
        super().__init__()

        def stage(blocks: int, in_channels: int, planes: int, stride: int) -> nn.Sequential:
            first = _Bottleneck(in_channels, planes, stride, widths, shortcut_widths)
            rest = (_Bottleneck(4 * planes, planes, 1, widths, shortcut_widths) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.conv1 = _float_conv(3, planes, 7, stride=2, padding=3)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(3, planes, planes, 1)
        self.layer2 = stage(4, 4 * planes, 2 * planes, 2)
        self.layer3 = stage(6, 8 * planes, 4 * planes, 2)
        self.layer4 = stage(3, 16 * planes, 8 * planes, 2)
        self.bn = _norm(32 * planes, widths)
        self.act = ActivationQuantizer()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32 * planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # the first block normalises what comes from the pool, so nothing stands between the two
        x = self.maxpool(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(self.avgpool(self.act(self.bn(x))).flatten(1))
        return out


def resnet50q(
    num_classes: int = 1000,
    widths: Widths = FAMILY_WIDTHS,
    planes: int = 64,
    plain_downsample_norm: bool = False,
) -> nn.Module:
    """Pre-activation ResNet-50 for ImageNet. Input (N, 3, H, W), naturally 224x224; output (N, num_classes).

    Args:
        num_classes: Rows of the classifier.
        widths: The bit widths that have a BatchNorm; none means plain ones.
        planes: Channels of the first convolution; everything else follows from it.
        plain_downsample_norm: The shortcuts have one BatchNorm for all widths, even where the blocks have more.
    """
    return _ImageNetResNet(num_classes, planes, widths, None if plain_downsample_norm else widths)


# svhnq


class _SvhnNet(nn.Module):
    def __init__(self, expansion: int, num_classes: int, widths: Widths) -> None:
        super().__init__()
        e = expansion

        def block(in_channels: int, channels: int, padding: int, *pool: nn.Module) -> tuple[nn.Module, ...]:
            conv = _conv(in_channels * e, channels * e, 3, padding=padding)
            return conv, _norm(channels * e, widths), *pool, ActivationQuantizer()

        # the positions in the Sequential are the keys of the checkpoints
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 6 * e, 5), nn.MaxPool2d(2), ActivationQuantizer()),
            *block(6, 8, 1),
            *block(8, 8, 1, nn.MaxPool2d(2)),
            *block(8, 16, 0),
            *block(16, 16, 1),
            *block(16, 16, 0),
            *(nn.Dropout(), _conv(16 * e, 64 * e, 5), Clamp()),
        )
        self.fc = nn.Linear(64 * e, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layers(x).flatten(1))
        return out


def svhnq(expansion: int = 8, num_classes: int = 10, widths: Widths = FAMILY_WIDTHS) -> nn.Module:
    """The seven-convolution SVHN network. Input (N, 3, H, W), H and W from 40 to 43; output (N, num_classes).

    Args:
        expansion: The convolutions have 6, 8, 16 and 64 times this many channels.
        num_classes: Rows of the classifier.
        widths: The bit widths that have a BatchNorm; none means plain ones.
    """
    return _SvhnNet(expansion, num_classes, widths)


# preresnet18q


class _PreActivationBlock(nn.Module):
    """Basic block over an activation that the very first block finds already computed."""

    def __init__(self, in_channels: int, channels: int, stride: int, first: bool, widths: Widths) -> None:
        super().__init__()
        self.pre_bn = nn.Identity() if first else _norm(in_channels, widths)
        self.pre_act = nn.Identity() if first else ActivationQuantizer()
        self.conv1 = _conv(in_channels, channels, 3, stride, padding=1)
        self.bn1_2 = _norm(channels, widths)
        self.act = ActivationQuantizer()
        self.conv2 = _conv(channels, channels, 3, padding=1)
        self.downsample = nn.Sequential(_conv(in_channels, channels, 1, stride)) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        p = self.pre_act(self.pre_bn(x))
        shortcut = x if self.downsample is None else self.downsample(p)
        out: Tensor = self.conv2(self.act(self.bn1_2(self.conv1(p)))) + shortcut
        return out


class _PreResNet(nn.Module):
    def __init__(self, num_classes: int, planes: int, widths: Widths) -> None:
        super().__init__()

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            first = _PreActivationBlock(in_channels, channels, stride, stride == 1, widths)
            return nn.Sequential(first, _PreActivationBlock(channels, channels, 1, False, widths))

        self.conv1 = _float_conv(3, planes, 7, stride=2, padding=3)
        self.bn1 = _norm(planes, widths)
        self.act = ActivationQuantizer()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(planes, planes, 1)
        self.layer2 = stage(planes, 2 * planes, 2)
        self.layer3 = stage(2 * planes, 4 * planes, 2)
        self.layer4 = stage(4 * planes, 8 * planes, 2)
        self.final_bn = _norm(8 * planes, widths)
        self.final_relu = ActivationQuantizer()
        self.avgpool = nn.AvgPool2d(7, stride=1)
        self.fc = nn.Linear(8 * planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(self.avgpool(self.final_relu(self.final_bn(x))).flatten(1))
        return out


def preresnet18q(num_classes: int = 1000, widths: Widths = FAMILY_WIDTHS, planes: int = 64) -> nn.Module:
    """Pre-activation ResNet-18 for ImageNet. Input (N, 3, H, W), H and W from 193 to 224; output (N, num_classes).

    Args:
        num_classes: Rows of the classifier.
        widths: The bit widths that have a BatchNorm; none means plain ones.
        planes: Channels of the first convolution; everything else follows from it.
    """
    # the checkpoints have ``model.`` in front of every key
    return nn.Sequential(OrderedDict(model=_PreResNet(num_classes, planes, widths)))


RESEARCH_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "preresnet18q": preresnet18q,
    "resnet20q": resnet20q,
    "resnet50q": resnet50q,
    "svhnq": svhnq,
}
