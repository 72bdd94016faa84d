"""Truncation-ready layers: the PyTorch reference for every parity claim, and what training uses.

Each layer keeps its float32 ``weight`` and quantises it in ``forward`` to the width that :func:`at_width` set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tqexport.errors import InputError, UsageError
from tqexport.truncation import (
    FLOAT_BITS,
    STORED_BITS,
    Quantizer,
    Scheme,
    affine,
    direct_codes,
    full_precision,
    magnitude,
    max_code,
    normalize,
    quantize_activation,
)

__all__ = [
    "ActivationQuantizer",
    "Clamp",
    "Estimator",
    "FollowsWeightWidth",
    "SwitchableBatchNorm1d",
    "SwitchableBatchNorm2d",
    "TruncConv1d",
    "TruncConv2d",
    "TruncLinear",
    "at_width",
    "quantize_weight",
    "quantized_layers",
    "set_quantizer",
    "switchable_batch_norms",
]

Estimator = Literal["identity", "scaled"]


class _QuantizeCodes(torch.autograd.Function):
    """x in [0, 1] -> codes / M_b, with the gradient passed straight through times ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, quantizer: Quantizer, factor: float) -> Tensor:
        ctx.factor = factor
        return direct_codes(x, bits, quantizer) / max_code(bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.factor, None, None, None


class _QuantizeActivation(torch.autograd.Function):
    """Activation quantiser whose gradient is that of the clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        return quantize_activation(x, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ((x >= 0) & (x <= 1)), None


def quantize_weight(weight: Tensor, bits: int, scheme: Scheme = Scheme(), estimator: Estimator = "identity") -> Tensor:
    """The weight a layer multiplies with at ``bits`` bits, differentiable.

    Args:
        weight: float32, any shape: one whole layer.
        bits: 1 to 8, or 32 for the full-precision path.
        scheme: The quantiser and its options.
        estimator: Gradient of the quantiser: ``identity``, or ``scaled`` by ``M_b / (M_b + 1)`` (arXiv 2506.11431).

    Returns:
        float32, the shape of ``weight``.
    """
    if bits == FLOAT_BITS:
        return full_precision(weight, scheme)
    factor = max_code(bits) / (max_code(bits) + 1) if estimator == "scaled" else 1.0
    unit: Tensor = _QuantizeCodes.apply(normalize(weight), bits, scheme.quantizer, factor)  # type: ignore[no-untyped-call]
    if scheme.bias_correction:
        coded = affine(weight.detach(), unit.detach() * max_code(bits), bits, scheme)
        return unit * (coded.scale * max_code(bits)) + coded.offset
    return magnitude(weight, scheme) * (2 * unit - 1)


class _TruncLayer:
    """What the quantised layers share: the width they run at and how they quantise."""

    weight: Tensor
    bits: int = STORED_BITS
    scheme: Scheme = Scheme()
    estimator: Estimator = "identity"

    def quantized_weight(self) -> Tensor:
        """float32 weight at the current width, the shape of ``weight``."""
        return quantize_weight(self.weight, self.bits, self.scheme, self.estimator)


class TruncConv1d(_TruncLayer, nn.Conv1d):
    """``nn.Conv1d`` with a truncation-ready weight. Input (N, C, L) float32."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.quantized_weight(), self.bias)
        return out


class TruncConv2d(_TruncLayer, nn.Conv2d):
    """``nn.Conv2d`` with a truncation-ready weight. Input (N, C, H, W) float32."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.quantized_weight(), self.bias)
        return out


class TruncLinear(_TruncLayer, nn.Linear):
    """``nn.Linear`` with a truncation-ready weight. Input (..., in_features) float32."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.quantized_weight(), self.bias)


class ActivationQuantizer(nn.Module):
    """``round(clamp(x, 0, 1) * M_a) / M_a`` at the current activation width; ReLU at 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.bits = STORED_BITS

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _QuantizeActivation.apply(input, self.bits)  # type: ignore[no-untyped-call]
        return result


class Clamp(nn.Module):
    """``clamp(x, 0, 1)``, not rounded, at quantised activation widths; ReLU at 32 bits. float32, same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.bits = STORED_BITS

    def forward(self, input: Tensor) -> Tensor:
        return input.relu() if self.bits == FLOAT_BITS else input.clamp(0, 1)


class _SwitchableBatchNorm(nn.Module):
    """One BatchNorm per width, chosen by ``bits``; keys ``bn_dict.<width>.*`` as in the research family."""

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
        try:
            norm = self.bn_dict[str(self.bits)]
        except KeyError:
            known = ", ".join(map(str, self.widths))
            raise InputError(f"there is no BatchNorm for {self.bits} bits; this network has {known}") from None
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        return norm

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.current(input)
        return result


class SwitchableBatchNorm1d(_SwitchableBatchNorm):
    """Per-width ``nn.BatchNorm1d``."""

    norm_class = nn.BatchNorm1d


class SwitchableBatchNorm2d(_SwitchableBatchNorm):
    """Per-width ``nn.BatchNorm2d``."""

    norm_class = nn.BatchNorm2d


class FollowsWeightWidth(nn.Module):
    """Base of whatever else in a network depends on the weight width: :func:`at_width` sets its ``bits``."""

    bits: int = STORED_BITS


TruncLayer = TruncConv1d | TruncConv2d | TruncLinear
TRUNC_LAYERS = (TruncConv1d, TruncConv2d, TruncLinear)


def quantized_layers(model: nn.Module) -> dict[str, TruncLayer]:
    """The quantised layers of a network by module name, in definition order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TRUNC_LAYERS)}


def set_quantizer(model: nn.Module, scheme: Scheme | None = None, estimator: Estimator | None = None) -> None:
    """Choose quantiser or straight-through estimator of every quantised layer, also of a network already built.

    Args:
        model: A prepared network; changed in place.
        scheme: The weight quantiser; None leaves it. Say the same in the checkpoint's ``CheckpointInfo``.
        estimator: ``identity`` or ``scaled``; None leaves it. A checkpoint does not record it, as files do not depend
            on it: set it again to train on.

    Raises:
        UsageError: There is no such estimator.
    """
    if estimator not in (None, *get_args(Estimator)):
        raise UsageError(f"there is no estimator {estimator!r}; choose {' or '.join(get_args(Estimator))}")
    for layer in quantized_layers(model).values():
        layer.scheme = scheme or layer.scheme
        layer.estimator = estimator or layer.estimator


def switchable_batch_norms(model: nn.Module) -> dict[str, _SwitchableBatchNorm]:
    """The per-width BatchNorms of a network by module name, in definition order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _SwitchableBatchNorm)}


@contextmanager
def at_width(
    model: nn.Module, bits: int, activation_bits: int | None = None, batch_norm_bits: int | None = None
) -> Iterator[nn.Module]:
    """Run a network at a width; the widths it had come back at the end.

    Args:
        model: A network of the layers of this module.
        bits: Weight width, 1 to 8, or 32.
        activation_bits: Activation width, 1 to 32; default ``bits``.
        batch_norm_bits: Which BatchNorm is live; default ``bits``.

    Example:
        >>> layer = TruncLinear(4, 2)
        >>> with at_width(layer, 2):
        ...     len(layer.quantized_weight().unique()) <= 4
        True
    """
    before: dict[TruncLayer | ActivationQuantizer | Clamp | _SwitchableBatchNorm | FollowsWeightWidth, int] = {}
    try:
        for module in model.modules():
            if isinstance(
                module, (*TRUNC_LAYERS, ActivationQuantizer, Clamp, _SwitchableBatchNorm, FollowsWeightWidth)
            ):
                before[module] = module.bits
                if isinstance(module, (ActivationQuantizer, Clamp)):
                    module.bits = bits if activation_bits is None else activation_bits
                elif isinstance(module, _SwitchableBatchNorm):
                    module.bits = bits if batch_norm_bits is None else batch_norm_bits
                else:
                    module.bits = bits
        yield model
    finally:
        for module, previous in before.items():
            module.bits = previous
