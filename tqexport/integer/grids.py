"""The 8-bit grids of a network: where a value lives between two layers, and how PyTorch rounds it there.

A grid has 256 levels: ``value = scale * (q - zero_point)``, ``q`` from 0 to 255. The grids of a network are buffers of
its own submodule ``grids``, one per value and width, so a checkpoint holds them like any other tensor, and running the
network rounds to them: PyTorch's network is then the integer network, but for the order in which floats are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tqexport.errors import InputError, UsageError
from tqexport.integer.naming import INPUT, NamedCalls
from tqexport.training.widths import FollowsWidth

__all__ = ["HIGHEST", "OFFSET", "Grid", "Grids", "attach_grids", "detach_grids", "grids_of", "without_grids"]

HIGHEST = 255
OFFSET = 128  # int8 values in files are levels less this
ATTRIBUTE = "grids"


@dataclass(frozen=True)
class Grid:
    """``value = scale * (q - zero_point)``, ``q`` a whole number from ``low`` to ``high``.

    Attributes:
        scale: A float32 number, positive.
        zero_point: 0 to 255.
        low: The least ``q``.
        high: The greatest ``q``, at most 255.
    """

    scale: float
    zero_point: int = 0
    low: int = 0
    high: int = HIGHEST

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0 and 0 <= self.zero_point <= HIGHEST):
            raise InputError(
                f"a grid of scale {self.scale} and zero point {self.zero_point} is damaged; calibrate again"
            )
        if not 0 <= self.low < self.high <= HIGHEST:
            raise InputError(f"a grid from {self.low} to {self.high} is damaged; calibrate again")

    @property
    def same_levels(self) -> tuple[float, int]:
        """Scale and zero point: values may pass between grids that have these in common without rounding."""
        return self.scale, self.zero_point


class _RoundToGrid(torch.autograd.Function):
    """Rounding whose gradient is that of the clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        q = (x / scale).round() + zero_point
        ctx.save_for_backward((q >= 0) & (q <= HIGHEST))
        return (q.clamp(0, HIGHEST) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


class Grids(FollowsWidth):
    """The grids of a network, at every width.

    Attributes:
        names: The values that have a grid, see :mod:`tqexport.integer.naming`.
        widths: The weight widths.
        scale: float32 (widths, names).
        zero_point: uint8 (widths, names).
        enabled: Whether running the network rounds to the grids.
    """

    follows = "weights"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, names: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__()
        self.names, self.widths, self.enabled = tuple(names), tuple(widths), True
        self.register_buffer("scale", torch.ones(len(widths), len(names)))
        self.register_buffer("zero_point", torch.zeros(len(widths), len(names), dtype=torch.uint8))
        self._running: list[_Rounding] = []

    def forward(self, input: Tensor) -> Tensor:
        """The input as it is: a network that is an ``nn.Sequential`` runs its grids as its last module."""
        return input

    def at(self, bits: int) -> dict[str, Grid]:
        """The grids of a width by name.

        Raises:
            InputError: A grid is damaged.
        """
        row = self._row(bits)
        pairs = zip(self.scale[row].tolist(), self.zero_point[row].tolist(), strict=True)
        return {name: Grid(scale, int(zero)) for name, (scale, zero) in zip(self.names, pairs, strict=True)}

    def set(self, bits: int, grids: Mapping[str, Grid]) -> None:
        """Put the grids of a width in place."""
        row = self._row(bits)
        for column, name in enumerate(self.names):
            self.scale[row, column] = grids[name].scale
            self.zero_point[row, column] = grids[name].zero_point

    def round(self, name: str, value: Any) -> Any:
        """A value on its grid at the current width, float32, same shape; any value without a grid as it is."""
        if name not in self.names or not isinstance(value, Tensor):
            return value
        row, column = self._row(self.bits), self.names.index(name)
        return _RoundToGrid.apply(value, self.scale[row, column], self.zero_point[row, column])  # type: ignore[no-untyped-call]

    def _row(self, bits: int) -> int:
        if bits not in self.widths:
            have = ", ".join(map(str, self.widths))
            raise InputError(f"this network has no grids for {bits} bits; it has them for {have}: calibrate it again")
        return self.widths.index(bits)


class _Rounding(NamedCalls):
    """Rounds each value of a running network that has a grid."""

    def __init__(self, root: nn.Module, grids: Grids) -> None:
        super().__init__(root)
        self._grids = grids

    def on_module(self, name: str, module: nn.Module, args: Sequence[Any], output: Any) -> Any:  # noqa: ARG002
        return self._grids.round(name, output)

    def on_function(self, name: str, function: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG002
        return self._grids.round(name, output)


def attach_grids(module: nn.Module, names: Sequence[str], widths: Sequence[int]) -> Grids:
    """Give a network grids, of scale 1 at first; from now on running it rounds to them.

    Args:
        module: A prepared network; changed in place: it gets a submodule ``grids``.
        names: The values that get a grid.
        widths: The weight widths that get one each.

    Raises:
        UsageError: The network has something named ``grids`` already.
    """
    if hasattr(module, ATTRIBUTE):
        raise UsageError("the network has grids already, or something else of that name; start from the one without")
    grids = Grids(names, widths)
    module.add_module(ATTRIBUTE, grids)
    module.register_forward_pre_hook(_begin)
    module.register_forward_hook(_end, always_call=True)
    return grids


def detach_grids(module: nn.Module) -> None:
    """Take the grids off a network again, in place; it runs as if it had never had any."""
    if grids_of(module) is None:
        return
    del module._modules[ATTRIBUTE]
    for hooks, ours in ((module._forward_pre_hooks, _begin), (module._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
    for key in [key for key in module._forward_hooks_always_called if key not in module._forward_hooks]:
        del module._forward_hooks_always_called[key]


def grids_of(module: nn.Module) -> Grids | None:
    """The grids of a network, if it has any."""
    grids = getattr(module, ATTRIBUTE, None)
    return grids if isinstance(grids, Grids) else None


@contextmanager
def without_grids(module: nn.Module) -> Iterator[None]:
    """Run a network as if it had no grids."""
    grids = grids_of(module)
    before = grids is not None and grids.enabled
    try:
        if grids is not None:
            grids.enabled = False
        yield
    finally:
        if grids is not None:
            grids.enabled = before


def _begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    grids = grids_of(module)
    if grids is None or not grids.enabled:
        return None
    rounded = (grids.round(INPUT, args[0]), *args[1:])
    mode = _Rounding(module, grids)
    mode.__enter__()
    grids._running.append(mode)
    return rounded


def _end(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    grids = grids_of(module)
    if grids is not None and grids._running:
        grids._running.pop().__exit__(None, None, None)
