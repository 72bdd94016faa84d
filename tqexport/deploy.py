"""The network as a device runs it: stored codes, a shift, and nothing that training needs.

:func:`deploy` copies a reference network with every width-dependent part replaced by a module whose buffers *are* the
width. So one capture serves every width: another width is another set of buffer values under the same names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tqexport.errors import about
from tqexport.integer.grids import grids_of
from tqexport.model import TruncModel
from tqexport.training.layers import switchable_batch_norms
from tqexport.training.quantizers import ActivationQuantizer, plain_name, quantized_weights
from tqexport.training.ranges import RangeQuantizer, check_ranges
from tqexport.truncation import FLOAT_BITS, StoredWeight, max_code, store

__all__ = ["StoredParameter", "buffers_in_file_order", "deploy", "deployed_values", "stored_weights"]


# Custom operators, so that export sees one node where it would otherwise see an emulation of it.


@torch.library.custom_op("tqexport::truncate", mutates_args=())
def truncate_op(codes: Tensor, shift: Tensor) -> Tensor:
    """``codes >> shift``; uint8 of any shape, uint8 scalar."""
    return codes >> shift


@torch.library.custom_op("tqexport::quantize_activation", mutates_args=())
def quantize_activation_op(input: Tensor, levels: Tensor) -> Tensor:
    """``round_half_even(clamp(input, 0, 1) * levels) / levels``; float32 of any shape, float32 scalar."""
    return (input.clamp(0, 1) * levels).round() / levels


@torch.library.custom_op("tqexport::quantize_range", mutates_args=())
def quantize_range_op(input: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
    """``round_half_even(clamp(input, low, high) * levels) / levels``; float32 of any shape, float32 scalars."""
    return (input.clamp(low, high) * levels).round() / levels


@truncate_op.register_fake
@quantize_activation_op.register_fake
@quantize_range_op.register_fake
def _like_first(first: Tensor, *_scalars: Tensor) -> Tensor:
    return torch.empty_like(first)


class StoredParameter(nn.Module):
    """The parametrization of a deployed parameter: ``scale * (codes >> shift) + offset``, whatever it is given."""

    codes: Tensor
    shift: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        self.register_buffer("codes", stored.codes)
        self.register_buffer("shift", torch.tensor(stored.shift, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(stored.affine.scale, dtype=torch.float32))
        self.register_buffer("offset", torch.tensor(stored.affine.offset, dtype=torch.float32))

    def forward(self, _original: Tensor) -> Tensor:
        shifted: Tensor = truncate_op(self.codes, self.shift)
        return shifted.float() * self.scale + self.offset


class StoredActivation(nn.Module):
    """Activation quantiser whose number of steps is a buffer."""

    levels: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(float(max_code(bits))))

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = quantize_activation_op(input, self.levels)
        return result


class StoredRange(nn.Module):
    """Activation quantiser of a learned range, whose grid at a width is buffers."""

    low: Tensor
    high: Tensor
    levels: Tensor

    def __init__(self, quantizer: RangeQuantizer) -> None:
        super().__init__()
        with torch.no_grad():
            for name, value in zip(("low", "high", "levels"), quantizer.grid(), strict=True):
                self.register_buffer(name, value.clone())

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = quantize_range_op(input, self.low, self.high, self.levels)
        return result


class ComputedParameter(nn.ModuleList):
    """In the place of parametrizations that do not depend on the width, such as weight norm: what they compute."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.original = nn.Parameter(value, requires_grad=False)  # a name that plain_name leaves out

    def forward(self) -> Tensor:
        return self.original


def stored_weights(model: TruncModel, bits: int) -> dict[str, StoredWeight]:
    """The stored form of every quantised weight at one width, by name (``layers.0.conv0.weight``).

    Raises:
        InputError: Bias correction is undefined for a layer; it is named.
    """
    stored: dict[str, StoredWeight] = {}
    for name, weight in quantized_weights(model.module).items():
        with about(f"layer {weight.layer}:"):
            stored[name] = store(weight.original.detach(), bits, weight.scheme)
    return stored


def deploy(model: TruncModel, bits: int) -> nn.Module:
    """Copy a reference network into its deployed form at one width.

    Args:
        model: The reference; it is not changed.
        bits: The width.

    Returns:
        A network in evaluation mode without one float copy of a quantised weight. Its values
        (:func:`deployed_values`) have the same names and shapes at every width that shares an activation kind
        (quantised, or ReLU at 32 bits).

    Raises:
        InputError: The checkpoint lacks the width, or a layer cannot be deployed.
    """
    model.check_width(bits)
    check_ranges(model.module)
    with model.at_width(bits) as reference:
        replaced: dict[int, object] = {}
        stored = stored_weights(model, bits)
        for name, weight in quantized_weights(reference).items():
            replaced[id(weight.quantizer)] = StoredParameter(stored[name])
            replaced[id(weight.original)] = nn.Parameter(torch.empty(0), requires_grad=False)
        for norm in switchable_batch_norms(reference).values():
            replaced[id(norm)] = copy.deepcopy(norm.current)
        for module in reference.modules():
            if isinstance(module, ActivationQuantizer):
                replaced[id(module)] = _stored_activation(module)
            elif isinstance(module, parametrize.ParametrizationList) and not {*map(id, module)} & {*replaced}:
                with torch.no_grad():
                    replaced[id(module)] = ComputedParameter(module())
        # deepcopy takes the replacement wherever the memo names the original
        copied: nn.Module = copy.deepcopy(reference, replaced)
    if (grids := grids_of(copied)) is not None:
        grids.final = True  # a file holds the rounded weights, and not how they were rounded
    return copied.eval()


def deployed_values(deployed: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a deployed network by the names that files give them (``conv.weight.codes``)."""
    # What is empty is the place of a float weight that is not there.
    return {plain_name(name): value for name, value in deployed.state_dict().items() if value.numel()}


def buffers_in_file_order(deployed: nn.Module) -> list[str]:
    """Names of the buffers of a deployed network as files have them: in each module, what is quantised comes last."""
    return [plain_name(name) for name in _buffers(deployed, "")]


def _buffers(module: nn.Module, prefix: str) -> Iterator[str]:
    """Names of the buffers of a module and its parts; quantised layers and activations come after their siblings."""
    yield from (prefix + name for name, _ in module.named_buffers(recurse=False))
    for name, part in sorted(module.named_children(), key=lambda child: _is_quantized(child[1])):
        yield from _buffers(part, f"{prefix}{name}.")


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (StoredActivation, StoredRange)) or parametrize.is_parametrized(module)


def _stored_activation(quantizer: ActivationQuantizer) -> nn.Module:
    """What stands in the place of an activation quantiser at its width."""
    if isinstance(quantizer, RangeQuantizer):
        if quantizer.bits != FLOAT_BITS:
            return StoredRange(quantizer)
        return nn.Identity() if quantizer.signed else nn.ReLU()
    return nn.ReLU() if quantizer.bits == FLOAT_BITS else StoredActivation(quantizer.bits)
