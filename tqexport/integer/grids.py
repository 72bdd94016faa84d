"""The 8-bit grids of a network: where a value lives between two layers, and how PyTorch rounds it there.

A grid has 256 levels: ``value = scale * (q - zero_point)``, ``q`` from 0 to 255. The grids of a network are buffers of
its own submodule ``grids``, one per value and width, so a checkpoint holds them like any other tensor, and running the
network rounds to them: PyTorch's network is then the integer network, but for the order in which floats are added. Its
float layers multiply with weights rounded to int8.

In training mode each grid follows the values: a moving average of the least and the greatest one of a batch, as
BatchNorms average. In evaluation mode the grids stand still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tqexport.errors import InputError, UsageError, about
from tqexport.integer.naming import INPUT, NamedCalls
from tqexport.integer.weights import int8_weights
from tqexport.training.quantizers import Clamp
from tqexport.training.widths import FollowsWidth
from tqexport.truncation import FLOAT_BITS

__all__ = [
    "HIGHEST",
    "OFFSET",
    "Grid",
    "Grids",
    "attach_grids",
    "detach_grids",
    "grid_of_range",
    "grids_of",
    "without_grids",
]

HIGHEST = 255
OFFSET = 128  # int8 values in files are levels less this
ATTRIBUTE = "grids"
_MOMENTUM = 0.1  # how far a grid goes towards the range of a batch: that of BatchNorms


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


def grid_of_range(low: float, high: float, *, symmetric: bool = False) -> Grid:
    """The grid of 256 levels that covers a range, with zero on a level; on the middle one if ``symmetric``.

    Raises:
        InputError: The range is empty.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        reach = max(-low, high)
        low, high = -reach * OFFSET / (OFFSET - 1), reach
    scale = float(np.float32((high - low) / HIGHEST))
    if not np.isfinite(scale) or scale <= 0:
        raise InputError(f"the values from {low} to {high} leave no room for a grid")
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, HIGHEST)))


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


@dataclass(frozen=True)
class _Range:
    """What a grid covers as numbers, its ends not rounded to levels, and the scale that came of it."""

    low: float
    high: float
    scale: float


class Grids(FollowsWidth):
    """The grids of a network, at every width.

    Attributes:
        names: The values that have a grid, see :mod:`tqexport.integer.naming`.
        widths: The weight widths.
        scale: float32 (widths, names); NaN where no grid was found yet.
        zero_point: uint8 (widths, names).
        enabled: Whether running the network rounds to the grids.
        final: Whether the float layers' weights are known to be rounded and all grids to be found, as in a deployed
            network, so that running it sees to neither.
    """

    follows = "weights"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, names: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__()
        self.names, self.widths, self.enabled, self.final = tuple(names), tuple(widths), True, False
        self.register_buffer("scale", torch.full((len(widths), len(names)), torch.nan))
        self.register_buffer("zero_point", torch.zeros(len(widths), len(names), dtype=torch.uint8))
        self._ranges: dict[tuple[int, str], _Range] = {}
        self._running: list[_Rounding] = []

    def forward(self, input: Tensor) -> Tensor:
        """The input as it is: a network that is an ``nn.Sequential`` runs its grids as its last module."""
        return input

    def add_widths(self, widths: Sequence[int]) -> None:
        """Make room for the grids of further widths, which are found when the network next trains at them."""
        known = {bits: row for row, bits in enumerate(self.widths)}
        self.widths = tuple(sorted({*known, *widths}))
        scale, zero_point = self.scale, self.zero_point
        self.scale = scale.new_full((len(self.widths), len(self.names)), torch.nan)
        self.zero_point = zero_point.new_zeros((len(self.widths), len(self.names)))
        for bits, row in known.items():
            self.scale[self._row(bits)], self.zero_point[self._row(bits)] = scale[row], zero_point[row]

    def check_found(self, bits: int) -> None:
        """Refuse a width at which a grid was not found yet.

        Raises:
            InputError: The first value without one is named.
        """
        if (missing := self.scale[self._row(bits)].isnan()).any():
            raise InputError(
                f"{self.names[int(missing.nonzero()[0])]} has no grid at {bits} bits yet: the network was not trained "
                "at that width, or the value was 0 all the while"
            )

    def at(self, bits: int) -> dict[str, Grid]:
        """The grids of a width by name.

        Raises:
            InputError: A grid is damaged, or was not found yet.
        """
        self.check_found(bits)
        row = self._row(bits)
        grids = {}
        for name, scale, zero_point in zip(
            self.names, self.scale[row].tolist(), self.zero_point[row].tolist(), strict=True
        ):
            with about(f"{name}:"):
                grids[name] = Grid(scale, int(zero_point))
        return grids

    def set(self, bits: int, grids: Mapping[str, Grid]) -> None:
        """Put the grids of a width in place."""
        row = self._row(bits)
        for column, name in enumerate(self.names):
            self.scale[row, column] = grids[name].scale
            self.zero_point[row, column] = grids[name].zero_point

    def round(self, name: str, value: Any, *, follow: bool = True) -> Any:
        """A value on its grid at the current width, float32, same shape; any value without a grid as it is.

        In training mode the grid follows the value first, unless ``follow`` says that it is known.
        """
        if name not in self.names or not isinstance(value, Tensor):
            return value
        row, column = self._row(self.bits), self.names.index(name)
        if self.training:
            low, high = (float(end) for end in value.detach().aminmax()) if follow else (0.0, 1.0)
            if not self._follow(row, column, low, high):
                return value
        return _RoundToGrid.apply(value, self.scale[row, column], self.zero_point[row, column])  # type: ignore[no-untyped-call]

    def _follow(self, row: int, column: int, low: float, high: float) -> bool:
        """Take a grid towards the range of a batch; returns whether there is one now."""
        key = self.widths[row], self.names[column]
        scale, zero_point = float(self.scale[row, column]), int(self.zero_point[row, column])
        before = self._ranges.get(key)
        if before is None or before.scale != scale:  # grids from a checkpoint or from calibration
            before = _Range(-zero_point * scale, (HIGHEST - zero_point) * scale, scale)
        if np.isfinite(low) and np.isfinite(high) and (low < 0 or high > 0):  # a value that is 0 shows no range
            if np.isfinite(scale):
                low, high = (old + _MOMENTUM * (new - old) for old, new in ((before.low, low), (before.high, high)))
            grid = grid_of_range(low, high, symmetric=bool((self.zero_point[row] == OFFSET).all()))
            self.scale[row, column], self.zero_point[row, column] = grid.scale, grid.zero_point
            self._ranges[key] = _Range(low, high, grid.scale)
            return True
        return bool(np.isfinite(scale))

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
        self._weights = {} if grids.final else int8_weights(root)

    def __enter__(self) -> NamedCalls:
        for layer, weight in self._weights.items():
            layer.__dict__["weight"] = weight  # in front of the parameter, which stays where it is
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for layer in self._weights:
            del layer.__dict__["weight"]

    def on_module(self, name: str, module: nn.Module, args: Sequence[Any], output: Any) -> Any:  # noqa: ARG002
        clamps = isinstance(module, Clamp) and module.bits != FLOAT_BITS
        return self._grids.round(name, output, follow=not clamps)

    def on_function(self, name: str, function: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ARG002
        return self._grids.round(name, output)


def attach_grids(module: nn.Module, names: Sequence[str], widths: Sequence[int]) -> Grids:
    """Give a network grids, to be set or found in training; from now on running it rounds to them.

    Args:
        module: A prepared network; changed in place: it gets a submodule ``grids``.
        names: The values that get a grid.
        widths: The weight widths that get one each.

    Raises:
        UsageError: The network has something named ``grids`` already.
    """
    if hasattr(module, ATTRIBUTE):
        raise UsageError("the network has grids already, or something else of that name; start from the one without")
    grids = Grids(names, widths).train(module.training)
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
    if not (grids.training or grids.final):
        grids.check_found(grids.bits)
    rounded = (grids.round(INPUT, args[0]), *args[1:])
    mode = _Rounding(module, grids)
    mode.__enter__()
    grids._running.append(mode)
    return rounded


def _end(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    grids = grids_of(module)
    if grids is not None and grids._running:
        grids._running.pop().__exit__(None, None, None)
