"""The integers that stand for a layer's weights.

A quantised layer's weights at ``b`` bits are ``E / M_b`` times the odd integers ``2 u_b - M_b``, symmetric around zero.
Up to 7 bits they fit int8, also multiplied by ``floor(127 / M_b)``, which keeps the resolution of biases. At 8 bits
they need nine bits, so that a layer has to read its input more than once, see :mod:`tqexport.integer.halves`.

A float layer's weights are int8 per output channel after calibration: ``max|w| / 127`` times whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tqexport.errors import ConversionError, InputError
from tqexport.layer_kinds import kind_of
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import Scheme, check_weight, max_code, store

__all__ = ["LARGEST", "Codes", "IntegerWeight", "int8_weights", "integer_weight", "multiplier_at", "round_float_layers"]

LARGEST = 127  # TFLite's int8 weights leave -128 out


@dataclass(frozen=True)
class Codes:
    """Where integer weights come from: ``multiplier * (2 * (codes >> shift) - highest)``.

    Attributes:
        codes: uint8, the shape of the weight, as in the checkpoint.
        shift: 0 to 7.
        highest: ``M_b``.
        multiplier: ``floor(127 / M_b)``, or 1 at 8 bits.
    """

    codes: npt.NDArray[np.uint8]
    shift: int
    highest: int
    multiplier: int

    @property
    def wide(self) -> bool:
        """Whether the integers need nine bits."""
        return self.highest > LARGEST


@dataclass(frozen=True)
class IntegerWeight:
    """Weights as integers times scales.

    Attributes:
        values: int16 (out, in, ...): -127 to 127, or odd numbers from -255 to 255.
        scale: float64 (out,), positive.
        codes: Where the integers come from; None for a float layer.
    """

    values: npt.NDArray[np.int16]
    scale: npt.NDArray[np.float64]
    codes: Codes | None = None


class _RoundToInt8(torch.autograd.Function):
    """Rounding to int8 levels, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - torch passes it
        return _rounded(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return gradients[0]


def round_float_layers(network: nn.Module) -> None:
    """Round the weights of the layers that tqexport leaves in float, in place, to int8 per output channel.

    The scale of a channel is ``max|w| / 127``.

    Raises:
        InputError: A weight holds NaN, or nothing but zeros.
        ConversionError: A weight is computed from other parameters.
    """
    with torch.no_grad():
        for name, layer in _float_layers(network):
            if "weight" not in layer._parameters:
                raise ConversionError(
                    f"the weight of layer {name} is no parameter of its own, so it cannot be rounded to int8; "
                    "take weight norm and its like off before prepare"
                )
            assert isinstance(layer.weight, torch.Tensor)
            check_weight(name, layer.weight)
            layer.weight.copy_(_rounded(layer.weight))


def int8_weights(network: nn.Module) -> dict[nn.Module, torch.Tensor]:
    """What float layers multiply with in a network that has grids: their weights, float32, rounded to int8 levels.

    The gradient goes straight through.
    """
    return {layer: _RoundToInt8.apply(layer.weight) for _, layer in _float_layers(network)}  # type: ignore[no-untyped-call]


def _float_layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions and linear layers that tqexport leaves in float."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if (kind := kind_of(module)) is not None and "weight" in kind.parameters and not quantized_weights(module)
    ]


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """float32 weights at the nearest int8 levels of their channels; rounding twice changes nothing."""
    with torch.no_grad():
        wide = weight.detach().double()
        largest = wide.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1))
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        return ((wide / scale).round() * scale).to(weight.dtype)


def multiplier_at(bits: int) -> int:
    """What the odd integers of a width are multiplied by: ``floor(127 / M_b)``, or 1 at 8 bits."""
    return max(1, LARGEST // max_code(bits))


def integer_weight(name: str, layer: nn.Module, bits: int) -> IntegerWeight:
    """The weights of a layer at a width.

    Args:
        name: The layer's, for messages.
        layer: A quantised layer, or a float one after calibration.
        bits: The weight width.

    Raises:
        ConversionError: The layer is corrected for bias, which moves its weights off the symmetric grid.
        InputError: A float layer's weight is not int8.
    """
    quantized = quantized_weights(layer).get("weight")
    if quantized is not None:
        return _quantized(name, quantized.original.detach(), bits, quantized.scheme)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    values = weight.detach().double().numpy()
    scale = _channel_scales(values)
    quotient = values / scale.reshape(-1, *[1] * (values.ndim - 1))
    whole = np.rint(quotient)
    if np.abs(quotient - whole).max() > 1e-3:
        raise InputError(f"the weights of {name} are floats; tqexport calibrate takes them to int8")
    return IntegerWeight(whole.astype(np.int16), scale)


def _quantized(name: str, weight: torch.Tensor, bits: int, scheme: Scheme) -> IntegerWeight:
    if scheme.bias_correction:
        raise ConversionError(f"{name} is corrected for bias, so its levels are not symmetric; use --kernel exact")
    stored = store(weight, bits, scheme)
    highest = max_code(bits)
    multiplier = multiplier_at(bits)
    codes = Codes(stored.codes.numpy(), stored.shift, highest, multiplier)
    levels = 2 * (codes.codes >> np.uint8(codes.shift)).astype(np.int16) - highest
    scale = stored.affine.scale / 2 / multiplier
    return IntegerWeight(levels * np.int16(multiplier), np.full(len(levels), scale), codes)


def _channel_scales(weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``max|w| / 127`` per output channel; 1 where a channel is all zeros."""
    largest = np.abs(weight.reshape(len(weight), -1)).max(1)
    return np.where(largest > 0, largest / LARGEST, 1.0)
