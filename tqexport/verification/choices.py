"""Whole numbers and truth values that rounding may change: where a value is largest, whether one is larger.

Two right computations give the same whole number, but where the numbers that it is chosen by are as near to each other,
or to a boundary, as rounding may take them. There it may be any other that the choice allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tqexport.verification.rounding import Call

__all__ = ["CHOICES"]


def _ranks(call: Call, *, backwards: bool, ties: bool) -> Tensor:
    """Places on an axis in the order of their values: any other place where a neighbour in that order is as near.

    Args:
        call: It has an axis ``dim``, or all values are one.
        backwards: Whether the largest comes first.
        ties: Whether equal values may come in any order.
    """
    value, dim = call.args[0], call.argument("dim")
    off = call.off(value).expand_as(value)
    if dim is None:
        value, off, dim = value.flatten(), off.flatten(), 0
    ordered, order = value.sort(dim, backwards)
    off = off.gather(dim, order)
    apart = ordered.diff(dim=dim).abs()
    near = apart < off.narrow(dim, 1, off.shape[dim] - 1) + off.narrow(dim, 0, off.shape[dim] - 1)
    near = near | ((apart == 0) if ties else False)
    edge = torch.zeros_like(ordered.narrow(dim, 0, 1), dtype=torch.bool)
    swapped = torch.cat([near, edge], dim) | torch.cat([edge, near], dim)
    result: Tensor = (value.shape[dim] - 1) * swapped.float()
    return result


def _first_rank(call: Call) -> Tensor:
    """The place of the largest or smallest value; of equal ones, the first counts everywhere."""
    smallest = call.func.overloadpacket in (_aten.argmin, _aten.min)
    dim = call.argument("dim")
    first = _ranks(call, backwards=not smallest, ties=False).select(0 if dim is None else dim, 0)
    place: Tensor = call.result if isinstance(call.result, Tensor) else call.result[1]
    return first.reshape(place.shape)


def _sorted_ranks(call: Call) -> Tensor:
    return _ranks(call, backwards=bool(call.argument("descending")), ties=True)


def _top_ranks(call: Call) -> Tensor:
    ranks = _ranks(call, backwards=bool(call.argument("largest")), ties=True)
    first: Tensor = ranks.narrow(call.argument("dim"), 0, call.argument("k"))
    return first


def _compared(call: Call) -> Tensor:
    """Whether a value is larger than another, or the like: not known where they are as near as they may be off."""
    one, other = (torch.as_tensor(each).double() for each in call.args[:2])
    near: Tensor = (one - other).abs() < call.off(call.args[0]) + call.off(call.args[1])
    return near.float()


def _cut_off(call: Call) -> Tensor:
    """A whole number from another: the neighbouring one where the other may lie on both sides of a whole number."""
    value: Tensor = call.args[0]
    off: Tensor = call.off(value)
    if not value.is_floating_point():
        return off.expand_as(value)
    boundary = torch.zeros_like(value) if call.result.dtype is torch.bool else value.round()
    return ((value - boundary).abs() < off).float()


_aten = torch.ops.aten
# By operator, by how much its whole numbers may be off.
CHOICES: dict[Any, Callable[[Call], Tensor]] = {
    **dict.fromkeys((_aten.argmax, _aten.argmin, _aten.max, _aten.min), _first_rank),
    **dict.fromkeys((_aten.gt, _aten.ge, _aten.lt, _aten.le, _aten.eq, _aten.ne), _compared),
    _aten.sort: _sorted_ranks,
    _aten.topk: _top_ranks,
    _aten._to_copy: _cut_off,
}
