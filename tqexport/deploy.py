"""The network as a device runs it: stored codes, a shift, and nothing that training needs.

:func:`deploy` copies a reference network with every width-dependent part replaced by a module whose buffers *are* the
width. So one capture serves every width: another width is another set of buffer values under the same names.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tqexport.errors import InputError
from tqexport.model import TruncModel
from tqexport.training.layers import (
    ActivationQuantizer,
    TruncConv1d,
    TruncConv2d,
    TruncLayer,
    TruncLinear,
    quantized_layers,
    switchable_batch_norms,
)
from tqexport.truncation import FLOAT_BITS, Scheme, max_code, store

__all__ = ["CODES_SUFFIX", "deploy"]

CODES_SUFFIX = ".weight.codes"  # layers.0.conv0.weight.codes: how files name the codes of a layer


# Custom operators, so that export sees one node where it would otherwise see an emulation of it.


@torch.library.custom_op("tqexport::truncate", mutates_args=())
def truncate_op(codes: Tensor, shift: Tensor) -> Tensor:
    """``codes >> shift``; uint8 of any shape, uint8 scalar."""
    return codes >> shift


@torch.library.custom_op("tqexport::quantize_activation", mutates_args=())
def quantize_activation_op(input: Tensor, levels: Tensor) -> Tensor:
    """``round_half_even(clamp(input, 0, 1) * levels) / levels``; float32 of any shape, float32 scalar."""
    return (input.clamp(0, 1) * levels).round() / levels


@truncate_op.register_fake
@quantize_activation_op.register_fake
def _like_first(first: Tensor, second: Tensor) -> Tensor:  # noqa: ARG001 - the shape of the second plays no part
    return torch.empty_like(first)


class StoredWeight(nn.Module):
    """``scale * (codes >> shift) + offset``."""

    codes: Tensor
    shift: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, layer: TruncLayer, bits: int, scheme: Scheme) -> None:
        super().__init__()
        stored = store(layer.weight.detach(), bits, scheme)
        self.register_buffer("codes", stored.codes)
        self.register_buffer("shift", torch.tensor(stored.shift, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(stored.affine.scale, dtype=torch.float32))
        self.register_buffer("offset", torch.tensor(stored.affine.offset, dtype=torch.float32))

    def forward(self) -> Tensor:
        shifted: Tensor = truncate_op(self.codes, self.shift)
        return shifted.float() * self.scale + self.offset


class StoredLayer(nn.Module):
    """A Conv or Linear layer over a :class:`StoredWeight`."""

    def __init__(self, layer: TruncLayer, bits: int) -> None:
        super().__init__()
        self.weight = StoredWeight(layer, bits, layer.scheme)
        self.bias = layer.bias
        self.operation = _operation(layer)

    def forward(self, input: Tensor) -> Tensor:
        return self.operation(input, self.weight(), self.bias)


class StoredActivation(nn.Module):
    """Activation quantiser whose number of steps is a buffer."""

    levels: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(float(max_code(bits))))

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = quantize_activation_op(input, self.levels)
        return result


def deploy(model: TruncModel, bits: int) -> nn.Module:
    """Copy a reference network into its deployed form at one width.

    Args:
        model: The reference; it is not changed.
        bits: The width.

    Returns:
        A network in evaluation mode without one float copy of a quantised weight. Its state dict has the same keys
        and shapes at every width that shares an activation kind (quantised, or ReLU at 32 bits).

    Raises:
        InputError: The checkpoint lacks the width, or a layer pads in a way that has no ONNX form.
    """
    model.check_width(bits)
    with model.at_width(bits) as reference:
        replaced: dict[int, nn.Module] = {}
        for name, layer in quantized_layers(reference).items():
            try:
                replaced[id(layer)] = StoredLayer(layer, bits)
            except InputError as error:
                raise InputError(f"layer {name}: {error}") from error
        for norm in switchable_batch_norms(reference).values():
            replaced[id(norm)] = copy.deepcopy(norm.current)
        for module in reference.modules():
            if isinstance(module, ActivationQuantizer):
                replaced[id(module)] = nn.ReLU() if module.bits == FLOAT_BITS else StoredActivation(module.bits)
        # deepcopy takes the replacement wherever the memo names the original
        copied: nn.Module = copy.deepcopy(reference, replaced)
    return copied.eval()


def _operation(layer: TruncLayer) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    if isinstance(layer, TruncLinear):
        return nn.functional.linear
    if layer.padding_mode != "zeros":
        raise InputError(f"padding mode {layer.padding_mode!r} is not supported; use zeros")
    function = {TruncConv1d: nn.functional.conv1d, TruncConv2d: nn.functional.conv2d}[type(layer)]
    return functools.partial(
        function, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
    )
