"""Networks for tests, in a state that training could have left them in, and their conversion and verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tqexport import CheckpointInfo, Scheme, TruncModel
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.verification.comparison import Verdict, compare

__all__ = [
    "Attention",
    "FloatLayers",
    "Layers",
    "assert_parity",
    "convert",
    "float_weight",
    "model_of",
    "one_dimensional",
    "randomize_",
]


def float_weight(layer: nn.Module) -> nn.Parameter:
    """The float32 weight that a layer trains, quantised or not."""
    return layer.parametrizations.weight.original if is_parametrized(layer) else layer.weight


def randomize_(module: nn.Module, seed: int) -> nn.Module:
    """Give a network weights and BatchNorm statistics that depend on ``seed`` alone; returns it, in evaluation mode.

    About a third of the BatchNorm gains are negative, and each width's BatchNorm is another, so that a gain folded with
    the wrong sign or a norm taken from the wrong width shows. Activations spread over [0, 1] instead of sticking to its
    ends.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    def normal(like: torch.Tensor, deviation: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * deviation

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.modules.conv._ConvNd, nn.Linear)):
                weight = float_weight(part)
                bound = (3 / weight[0].numel()) ** 0.5
                weight.copy_(uniform(weight, -bound, bound))
                if part.bias is not None:
                    part.bias.copy_(normal(part.bias, 0.2))
            elif isinstance(part, nn.modules.batchnorm._BatchNorm):
                sign = torch.where(uniform(part.weight, 0, 1) < 1 / 3, -1.0, 1.0)
                part.weight.copy_(sign * uniform(part.weight, 0.3, 0.7))
                part.bias.copy_(uniform(part.bias, 0.2, 0.8))
                part.running_mean.copy_(normal(part.running_mean, 0.1))
                part.running_var.copy_(uniform(part.running_var, 0.02, 0.08))
                part.num_batches_tracked.fill_(1000)
    return module.eval()


class Layers(nn.Module):
    """Grouped, depthwise, dilated, strided, asymmetric and 1x1 convolutions, a linear layer behind a flatten."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), padding=(1, 0))
        self.norm0 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 6, (1, 3), stride=(2, 1), groups=3)
        self.norm3 = nn.BatchNorm2d(6)
        self.dilated = nn.Conv2d(6, 5, (3, 2), dilation=(1, 2), padding=(2, 1))
        self.norm4 = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5 * 7 * 7, 9)
        self.last = nn.Linear(9, 3)
        self.act0, self.act1, self.act2, self.act3, self.act4, self.act5 = (nn.ReLU() for _ in range(6))

    def forward(self, x):
        x = self.act0(self.norm0(self.first(x)))
        x = self.act1(self.norm1(self.depthwise(x)))
        x = self.act2(self.norm2(self.pointwise(x)))
        x = self.act3(self.norm3(self.grouped(x)))
        x = self.act4(self.norm4(self.dilated(x)))
        return self.last(self.act5(self.hidden(x.flatten(1))))


class FloatLayers(nn.Module):
    """Float layers with each width's own BatchNorms, in the middle and behind activations; one layer is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm0 = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.shortcut, self.norm1 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.norm3, self.norm4 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.act0, self.act1, self.act2, self.act3 = (nn.ReLU() for _ in range(4))
        self.hidden, self.act4, self.last = nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5)

    def forward(self, x):
        x = self.act0(self.norm0(self.first(x)))
        x = self.act1(self.norm2(self.conv(x)) + self.norm1(self.shortcut(x)))
        x = self.act2(self.norm3(self.twice(x)))
        x = self.act3(self.norm4(self.twice(x)))
        return self.last(self.act4(self.hidden(x.mean((2, 3)))))


def one_dimensional() -> nn.Module:
    """Convolutions over (N, 3, 14), and linear layers."""
    return nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 5, 4, stride=2, padding=1), nn.BatchNorm1d(5),
        nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip


class Attention(nn.Module):
    """Attention of two heads over (N, steps, 6), with linear layers around it; its reshapes have the batch in them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        mixed: torch.Tensor = self.last(self.attention(x, x, x, need_weights=False)[0]).mean(1)
        return mixed


def model_of(
    network: nn.Module,
    shape: Sequence[int],
    widths: Sequence[int] = (1, 4, 8),
    scheme: Scheme = Scheme(),
    activation_bits: Sequence[int] = (),
) -> TruncModel:
    """A prepared network with a description."""
    info = CheckpointInfo("test", {}, tuple(shape), tuple(widths), scheme, tuple(activation_bits))
    return TruncModel(network.eval(), info)


def convert(model: TruncModel, batch: int = 1) -> dict[int, bytes]:
    """The fixed TFLite file of each width."""
    models = [onnx.load_from_string(content) for _, content in export_onnx(model, model.info.widths)]
    return dict(zip(model.info.widths, convert_to_tflite(models, batch=batch), strict=True))


def samples_for(model: TruncModel, count: int) -> npt.NDArray[np.float32]:
    """Samples from -1 to 1, always the same ones."""
    return 2 * np.random.default_rng(0).random((count, *model.info.input_shape), np.float32) - 1


def assert_parity(model: TruncModel, files: Mapping[int, bytes], samples: int = 4) -> list[Verdict]:
    """The fixed files of some widths, of any format, compute what PyTorch computes; returns how they compare."""
    x = samples_for(model, samples)
    verdicts = []
    for bits, content in files.items():
        found = compare(model, bits, run_file(content, x), x)
        assert found.passed, (bits, found.runtime, found.problems)
        assert found.codes > 0
        verdicts.append(found)
    return verdicts
