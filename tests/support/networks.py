"""Networks in a state that training could have left them in."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["float_weight", "randomize_"]


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
