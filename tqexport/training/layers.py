"""Truncation-ready layers: the PyTorch reference for every parity claim, and what training uses.

``TruncConv2d(...)`` is ``nn.Conv2d(...)`` with a quantised weight; any other layer gets one by
:func:`tqexport.training.quantizers.quantize_parameter`, as ``prepare`` does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from tqexport.errors import InputError
from tqexport.training.quantizers import quantize_parameter
from tqexport.training.widths import FollowsWidth

__all__ = [
    "SwitchableBatchNorm",
    "SwitchableBatchNorm1d",
    "SwitchableBatchNorm2d",
    "SwitchableBatchNorm3d",
    "TruncConv1d",
    "TruncConv2d",
    "TruncLinear",
    "switchable_batch_norms",
]


class _QuantizedWeight(nn.Module):
    """In front of a layer of ``torch.nn``: the layer's weight gets a quantiser when it is built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        quantize_parameter(self)


class TruncConv1d(_QuantizedWeight, nn.Conv1d):
    """``nn.Conv1d`` with a truncation-ready weight. Input (N, C, L) float32."""


class TruncConv2d(_QuantizedWeight, nn.Conv2d):
    """``nn.Conv2d`` with a truncation-ready weight. Input (N, C, H, W) float32."""


class TruncLinear(_QuantizedWeight, nn.Linear):
    """``nn.Linear`` with a truncation-ready weight. Input (..., in_features) float32."""


class SwitchableBatchNorm(FollowsWidth):
    """One BatchNorm per width, chosen by ``bits``; keys ``bn_dict.<width>.*`` as in the research family."""

    follows = "batch norms"
    norm_class: type[nn.modules.batchnorm._BatchNorm]

    def __init__(self, num_features: int, widths: Iterable[int], eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn_dict = nn.ModuleDict(
            {str(width): self.norm_class(num_features, eps=eps, momentum=momentum) for width in widths}
        )
        self.bits = max(int(width) for width in self.bn_dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that have a BatchNorm, ascending."""
        return tuple(sorted(int(width) for width in self.bn_dict))

    @property
    def current(self) -> nn.modules.batchnorm._BatchNorm:
        """The BatchNorm of the current width.

        Raises:
            InputError: The current width has none.
        """
        if str(self.bits) not in self.bn_dict:
            known = ", ".join(map(str, self.widths))
            raise InputError(f"there is no BatchNorm for {self.bits} bits; this network has {known}")
        return cast(nn.modules.batchnorm._BatchNorm, self.bn_dict[str(self.bits)])

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.current(input)
        return result


class SwitchableBatchNorm1d(SwitchableBatchNorm):
    """Per-width ``nn.BatchNorm1d``."""

    norm_class = nn.BatchNorm1d


class SwitchableBatchNorm2d(SwitchableBatchNorm):
    """Per-width ``nn.BatchNorm2d``."""

    norm_class = nn.BatchNorm2d


class SwitchableBatchNorm3d(SwitchableBatchNorm):
    """Per-width ``nn.BatchNorm3d``."""

    norm_class = nn.BatchNorm3d


def switchable_batch_norms(model: nn.Module) -> dict[str, SwitchableBatchNorm]:
    """The per-width BatchNorms of a network by module name, in definition order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwitchableBatchNorm)}
