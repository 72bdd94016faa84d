"""Running a network at a width: every part whose computation depends on a width follows one of three."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

from torch import nn

from tqexport.truncation import STORED_BITS

__all__ = ["FollowsWidth", "at_width"]


class FollowsWidth(nn.Module):
    """A module whose computation depends on the current width.

    Attributes:
        follows: Which width it follows: that of the weights, of the activations, or of the BatchNorms.
        bits: The current width, 1 to 8, or 32.
    """

    follows: ClassVar[Literal["weights", "activations", "batch norms"]]

    def __init__(self, bits: int = STORED_BITS) -> None:
        super().__init__()
        self.bits = bits


@contextmanager
def at_width(
    model: nn.Module, bits: int, activation_bits: int | None = None, batch_norm_bits: int | None = None
) -> Iterator[nn.Module]:
    """Run a network at a width; the widths it had come back at the end.

    Args:
        model: A prepared network, or one of its layers.
        bits: Weight width, 1 to 8, or 32.
        activation_bits: Activation width, 1 to 32; default ``bits``.
        batch_norm_bits: Which BatchNorm is live; default ``bits``.

    Example:
        >>> from tqexport import TruncLinear
        >>> layer = TruncLinear(4, 2)
        >>> with at_width(layer, 2):
        ...     len(layer.weight.unique()) <= 4
        True
    """
    wanted = {
        "weights": bits,
        "activations": bits if activation_bits is None else activation_bits,
        "batch norms": bits if batch_norm_bits is None else batch_norm_bits,
    }
    before = {module: module.bits for module in model.modules() if isinstance(module, FollowsWidth)}
    try:
        for module in before:
            module.bits = wanted[module.follows]
        yield model
    finally:
        for module, previous in before.items():
            module.bits = previous
