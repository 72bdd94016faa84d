"""Activation quantisers whose range is learned: for values that are signed, or that reach beyond 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tqexport.errors import InputError
from tqexport.training.quantizers import ActivationQuantizer
from tqexport.truncation import FLOAT_BITS, range_levels

__all__ = ["INPUT_QUANTIZER", "RangeQuantizer", "behind_relu", "check_ranges", "quantize_input", "ranges_of"]

INPUT_QUANTIZER = "input_quantizer"  # what a layer calls the quantiser of its input
_INPUTS = ("input", "query", "key", "value")  # what is rounded of what a layer is called with by name
_UNTRAINED = 4.0  # what a range is before training finds one
_DEVIATIONS = 3.0  # how far the first range reaches
_SMALLEST, _LARGEST = 1e-30, 1e30  # of a range; its reciprocal is a float32 too

# What lets the values of an activation quantiser through as they are.
_PASSING: tuple[type[nn.Module], ...] = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)


class _Round(torch.autograd.Function):
    """Rounding to whole numbers, half to even, that lets gradients through."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return value.round()

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _ScaledGradient(torch.autograd.Function):
    """The value itself, with its gradient times ``factor``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class RangeQuantizer(ActivationQuantizer):
    """Activation quantiser whose range is learned: one number ``r`` for a tensor and for all widths.

    It rounds to ``k r / n``, ``round_half_even(clamp(x, low r / n, high r / n) n / r) r / n``, with ``low``, ``high``
    and ``n`` of the width from :func:`tqexport.truncation.range_levels`: unsigned ones reach from 0 to ``r``, signed
    ones from ``-r`` to just below ``r``.

    The gradient of ``r`` is that of the formula with a rounding that lets gradients through, divided by
    ``sqrt(numbers in the tensor * n)``, as LSQ has it for its step (arXiv 1902.08153, sections 2.1 and 2.2). The first
    batch in training mode sets ``r`` to three times the root mean square of what is to be rounded.

    At 32 bits nothing is rounded; an unsigned one is then a ReLU. float32 of any shape in, the same shape out.

    Attributes:
        range: ``r``, a float32 scalar, which is trained; its sign plays no part.
        signed: Whether it rounds to negative numbers, too.
        found: Whether ``r`` comes from training. Not in a state dict: what is loaded was found.
    """

    def __init__(self, *, signed: bool) -> None:
        super().__init__()
        self.signed = signed
        self.found = False
        self.range = nn.Parameter(torch.tensor(_UNTRAINED))

    def forward(self, input: Tensor) -> Tensor:
        if self.bits == FLOAT_BITS:
            return input if self.signed else input.relu()
        if self.training and not self.found:
            self._find(input.detach())
        low, high, levels = self.grid(input.numel())
        rounded: Tensor = _Round.apply(input.clamp(low, high) * levels)  # type: ignore[no-untyped-call]
        return rounded / levels

    def grid(self, numbers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """The lowest and the highest number that it rounds to, and how many levels are 1 apart; float32 scalars.

        Args:
            numbers: How many numbers a gradient comes from.
        """
        lowest, highest, steps = range_levels(self.bits, signed=self.signed)
        size = _ScaledGradient.apply(self.range, (numbers * steps) ** -0.5).abs()  # type: ignore[no-untyped-call]
        return size * (lowest / steps), size * (highest / steps), steps / size

    def _find(self, input: Tensor) -> None:
        """Set the range from a batch."""
        values = input if self.signed else input[input > 0]
        size = float(values.square().mean().sqrt()) if values.numel() else 0.0
        self.found = size > 0
        if self.found:
            self.range.data.fill_(_DEVIATIONS * size)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.found = self.found or f"{prefix}range" in state_dict


def quantize_input(layer: nn.Module) -> None:
    """Let a layer round what it is called with, to levels of a signed range of its own.

    The quantiser is a part of the layer, called ``input_quantizer``. A layer that takes several tensors (attention) has
    one range for all of them, and a tensor that it takes twice is rounded once.

    Args:
        layer: A layer that takes float32 tensors; changed in place.
    """
    layer.add_module(INPUT_QUANTIZER, RangeQuantizer(signed=True))
    layer.register_forward_pre_hook(_with_rounded_inputs, with_kwargs=True)


def _with_rounded_inputs(layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    quantizer = getattr(layer, INPUT_QUANTIZER)
    rounded: dict[int, Tensor] = {}

    def once(value: Any) -> Any:
        if id(value) not in rounded:
            rounded[id(value)] = quantizer(value)
        return rounded[id(value)]

    inputs = 3 if isinstance(layer, nn.MultiheadAttention) else 1  # queries, keys and values; what follows are masks
    named = {name: once(value) if name in _INPUTS else value for name, value in kwargs.items()}
    return (*map(once, args[:inputs]), *args[inputs:]), named


def behind_relu(model: nn.Module) -> set[nn.Module]:
    """The modules of every ``nn.Sequential`` that read what a ReLU gives, as it is or moved."""
    found: set[nn.Module] = set()

    def walk(parts: Iterable[nn.Module], after: bool) -> bool:
        for part in parts:
            if isinstance(part, nn.Sequential):
                after = walk(part, after)
                continue
            if after:
                found.add(part)
            after = type(part) is nn.ReLU or (after and isinstance(part, _PASSING))
        return after

    for module in model.modules():
        if isinstance(module, nn.Sequential):
            walk(module, False)
    return found


def ranges_of(model: nn.Module) -> dict[str, RangeQuantizer]:
    """The activation quantisers of a network whose range is learned, by name, in definition order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RangeQuantizer)}


def check_ranges(model: nn.Module) -> None:
    """Refuse ranges that nothing can be rounded to.

    Raises:
        InputError: A range is so small or so large that its levels are no numbers; its quantiser is named.
    """
    for name, quantizer in ranges_of(model).items():
        size = float(quantizer.range.detach().abs())
        if not _SMALLEST <= size <= _LARGEST:
            raise InputError(
                f"the range of {name} is {size:g}, of which no levels can be made; train it again, at a lower learning "
                "rate"
            )
