"""What each operator makes of the rounding errors of its inputs, and what it adds of its own.

By Higham and Mary's probabilistic error analysis (SIAM J. Sci. Comput. 41, 2019, A2815, and 42, 2020, A3427), rounding
errors are independent, of mean zero and at most ``u = 2^-24`` of what is rounded. A dot product of n terms ``a_i = w_i
x_i`` rounds each of its partial sums ``s_k`` with variance ``u^2 s_k^2 / 3``; over all orders of the terms, ``sum
s_k^2`` is on average ``(n + 1) (sum a_i^2 + 2 (sum a_i)^2) / 6``. The weights ``scale * code + offset`` are rounded
too, by about ``2 u W`` with ``W`` the largest of the layer, however small they are themselves, and alike wherever one
code stands, so that these errors add up to ``2 u W sum |x_i| <= 2 u W sqrt(n sum x_i^2)``, which covers the first part
of the sum above as well. Equal terms are rounded alike, so that their errors add up, too. How many may be alike is
taken from how large their sum ``s`` is: ``m = s / (W sqrt(sum x_i^2 / n))`` is ``n`` for equal ones, about ``sqrt(n)``
or less for those of mixed signs, and between for others. With ``r`` for the sum and what is added to it, and with the
errors of the inputs passed on::

    variance  =  (2 u W)^2 n sum x_i^2  +  u^2 max(n r^2, m^2 (r^2 + s^2)) / 9  +  sum w_i^2 variance_i

Operators without a rule are tried on inputs that are moved by their error and by rounding (:func:`tried`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from tqexport.verification.rounding import Call

__all__ = ["MARGIN", "RULES", "UNIT", "moved", "tensors_of", "tried"]

MARGIN = 8.0  # standard deviations that a difference may have: two computations, and a tail that nothing right reaches
UNIT = 2.0**-24  # of float32
_TRIALS = 12  # with fewer, one of a million results may look as if nothing moved it
_BEND_OF_SIGMOID, _BEND_OF_TANH = 3**0.5 / 18, 4 / 3**1.5  # the largest second derivatives
_CUBIC_SHARES = 1.375  # what the shares of four values in a cubic interpolation add up to, signs aside
_ENLARGED = 256.0  # a trial moves inputs by this many standard deviations, so that rounding does not hide the effect


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, however nested."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def moved(call: Call) -> Any:
    """An operator that only moves values moves their errors likewise."""
    return call.repeated(lambda x: call.variance(x) if call.inexact(x) else torch.zeros_like(x))


def _padded(call: Call) -> Any:
    """An operator that moves values, and adds constants, which have no error."""
    return call.func(call.variance(call.args[0]), call.args[1])


def _averaged(call: Call) -> Any:
    """A mean: errors that are all alike do not average out, and each sum is rounded as in a dot product."""
    terms = call.args[0].numel() / max(call.result.numel(), 1)
    if call.func.overloadpacket is _aten.avg_pool2d:  # whose windows may overlap
        terms = call.args[1][0] * call.args[1][-1]
    squares = call.repeated(torch.square)
    alike = (terms**2 * call.result.square() / squares).nan_to_num(0.0)
    return moved(call) + UNIT**2 * (torch.clamp_min(2 / 9 * alike, terms) * call.result.square() + squares)


def _clamped(call: Call) -> Any:
    """An operator whose slope is never above 1 does not enlarge an error."""
    if any(call.inexact(limit) for limit in call.args[1:]):
        return tried(call)
    variance: Tensor = call.variance(call.args[0]) + torch.zeros_like(call.result)  # of its own: it may be changed
    return variance


def _new(call: Call) -> Any:
    """A tensor of constants, or of nothing yet."""
    return torch.zeros_like(call.result)


def _copied(call: Call) -> Any:
    """A tensor put in the place of another."""
    return call.variance(call.args[1]) + torch.zeros_like(call.result)


def _added(call: Call) -> Any:
    """A sum or difference: the errors add up, and the result is rounded."""
    left, right = call.args[:2]
    alpha = call.kwargs.get("alpha", call.args[2] if len(call.args) > 2 else 1)  # what the right one is multiplied by
    product = 0 if alpha == 1 else (UNIT * alpha * right) ** 2
    return call.variance(left) + alpha**2 * call.variance(right) + product + (UNIT * call.result).square()


def _scaled(call: Call) -> Any:
    """A product or quotient; the errors of both are taken to be alike, which they are in ``x * x``."""
    if call.kwargs:  # a quotient that is rounded to an integer
        return tried(call)
    left, right = call.args
    spread = call.func(call.variance(left).sqrt(), right).abs() if call.inexact(left) else 0.0
    if call.inexact(right):
        slope = left if call.func.overloadpacket in (_aten.mul, _aten.mul_) else call.result / right
        spread = spread + (slope * call.variance(right).sqrt()).abs()
    return spread**2 + (UNIT * call.result).square()


def _normalised(call: Call) -> Any:
    """A BatchNorm, of which a runtime may have multiplied out everything that does not depend on the sample."""
    value, weight, bias, mean, spread = call.args[:5]
    if mean is None:  # by the sample's own statistics, as InstanceNorm does
        return tried(call)
    shape = (1, -1, *[1] * (value.dim() - 2))
    gain = (spread + call.args[-1]).rsqrt() * (1 if weight is None else weight)
    constants = (gain * mean).square() + (0 if bias is None else bias.square())
    slope = gain.square().view(shape)
    return slope * call.variance(value) + (2 * UNIT) ** 2 * (slope * value.square() + constants.view(shape))


def _convolved(call: Call) -> Any:
    """A convolution, transposed or not."""
    value, weight, bias, *geometry = call.args
    if call.inexact(weight) or call.inexact(bias):
        return tried(call)
    groups = geometry[-1]

    def sum_of_squares(x: Tensor) -> Tensor:
        """Over the channels of a group, then over the kernel's window: the same for all its output channels."""
        squares = x.square().reshape(len(x), groups, -1, *x.shape[2:]).sum(2)
        total: Tensor = call.func(squares, weight.new_ones((groups, 1, *weight.shape[2:])), None, *geometry)
        return total.repeat_interleave(call.result.shape[1] // groups, 1)

    def passed_on(variance: Tensor) -> Any:
        return call.func(variance, weight.square(), None, *geometry)

    sums = call.result if bias is None else call.result - bias.view(-1, *[1] * (call.result.dim() - 2))
    terms = weight.numel() // call.result.shape[1]
    return _dot_products(call, value, weight, sums, terms, sum_of_squares, passed_on)


def _multiplied(call: Call) -> Any:
    """A product of matrices, of which both may depend on the sample."""
    left, right = call.args[-2:]
    if call.kwargs:  # the parts of an addmm are multiplied
        return tried(call)
    variance = _dot_products(
        call,
        left,
        right,
        call.result - call.args[0] if len(call.args) > 2 else call.result,
        left.shape[-1],
        lambda x: x.square().sum(-1, keepdim=True).expand_as(call.result),
        lambda variance: torch.matmul(variance, right.square()),
    )
    if call.inexact(right):
        variance = variance + left.square() @ call.variance(right)
    return variance + call.variance(call.args[0]) if len(call.args) > 2 else variance  # of what addmm adds


def _looked_up(call: Call) -> Any:
    """Rows of a table, whose weights may be de-quantised: each is off by a share of the largest."""
    table = call.args[0]
    if call.inexact(table):
        return tried(call)
    return torch.full_like(call.result, (2 * UNIT * float(table.abs().max())) ** 2)


def _dot_products(
    call: Call,
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    terms: int,
    sum_of_squares: Callable[[Tensor], Tensor],
    passed_on: Callable[[Tensor], Any],
) -> Tensor:
    """Dot products by the formula in the module's docstring.

    Args:
        call: The operator.
        x: What is multiplied.
        weight: By what.
        sums: The results without what is added to them.
        terms: How many products each consists of.
        sum_of_squares: Of ``x``, for each result.
        passed_on: The last sum of the formula.
    """
    largest, squares = float(weight.abs().max()), sum_of_squares(x)
    own = (2 * UNIT * largest) ** 2 * terms * squares
    alike = (terms * sums.square() / (largest**2 * squares)).nan_to_num(0.0, 0.0).clamp_max(terms**2)
    partial = torch.maximum(terms * call.result.square(), alike * (sums.square() + call.result.square()))
    variance: Tensor = own + UNIT**2 / 9 * partial
    incoming = call.variance(x)
    if isinstance(incoming, Tensor) and incoming.any():
        variance = variance + passed_on(incoming)
    return variance


def tried(call: Call) -> list[Tensor]:
    """Try any operator on inputs that are off by their error and by rounding, at random; the largest effect counts."""

    def off(value: Tensor) -> Tensor:
        if not call.inexact(value) or not value.is_floating_point():
            return value.clone() if call.func._schema.is_mutable else value
        variance, rounding = call.variance(value), (4 * UNIT * value).abs()
        # A number that stands for infinity, such as -1e38, has a variance that is too large for a float32.
        spread = torch.where(variance.isinf(), rounding, (variance + rounding.square()).sqrt())
        share = 2.5 * torch.rand(value.shape, generator=call.errors._random) - 1.25  # of signs, two may always cancel
        return torch.where(value.isfinite(), value + _ENLARGED * share * spread, value)

    results = tensors_of(call.result)
    effects = [torch.zeros_like(value) for value in results]
    for _ in range(_TRIALS):
        for effect, value, moved in zip(effects, results, tensors_of(call.repeated(off)), strict=True):
            if value.is_floating_point():  # NaN: outside of what the operator is defined for
                change = ((moved - value) / _ENLARGED).abs().nan_to_num(0.0, math.inf)
                torch.maximum(effect, change, out=effect)
    return [effect.square() + (4 * UNIT * value).square() for effect, value in zip(effects, results, strict=True)]


def _recurrent(call: Call) -> list[Any]:
    """An LSTM in one kernel of oneDNN, (T, N, C): its error is that of the gates written out, step by step."""
    value, into, back, *biases, hidden, cell, reverse = call.args[:8]
    if not call.args[12]:  # where there are no biases, the weights stand in their place again
        biases = [into.new_zeros(len(into))] * 2
    outputs = []
    with call.errors:
        steps = value.unbind()
        for step in reversed(steps) if reverse else steps:
            gates = torch.addmm(biases[0], step, into.t()) + torch.addmm(biases[1], hidden, back.t())
            enter, keep, new, show = gates.split(len(into) // 4, 1)  # type: ignore[no-untyped-call]
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = show.sigmoid() * cell.tanh()
            outputs.append(hidden)
        output = torch.stack(outputs[::-1] if reverse else outputs)
    return [call.variance(result) for result in (output, hidden, cell)]


def _interpolated(call: Call) -> Tensor:
    """Values between others: sums of those around a place, whose errors are taken to be alike.

    Where a place lies is rounded too, which moves it by a share of what the values around it differ. It is ``index *
    (sizes - 1) / (sizes' - 1)`` or the like: two roundings, of at most the number of places.
    """
    value = call.args[0]
    axes = value.dim() - 2
    cubic = call.func.overloadpacket is _aten.upsample_bicubic2d
    reach, share = (2, _CUBIC_SHARES**axes) if cubic else (1, 1.0)
    pool = getattr(torch.nn.functional, f"max_pool{axes}d")

    def around(x: Tensor) -> Tensor:
        """The largest of all that a place between these lies among."""
        largest = pool(x, 2 * reach + 1, 1, reach)
        mode, corners = ("linear", "bilinear")[axes - 1], call.argument("align_corners")
        return torch.nn.functional.interpolate(largest, call.result.shape[2:], mode=mode, align_corners=corners)

    # Two roundings of a place are the largest error, and it is MARGIN standard deviations.
    places = (2 * UNIT / MARGIN) ** 2 * sum(size**2 for size in value.shape[2:])
    passed_on = around(call.variance(value).sqrt()) * share
    own = 2 * UNIT * share * around(value.abs())
    variance: Tensor = passed_on**2 + own**2 + places * (around(value) + around(-value)).square()
    return variance


def _sampled(call: Call) -> list[Tensor]:
    """Values at places of a grid, with zeros around them; the grid is computed, and the places of it."""
    value = call.args[0]
    axes = tuple(range(2, value.dim()))
    difference = value.amax(axes, keepdim=True).clamp_min(0) - value.amin(axes, keepdim=True).clamp_max(0)
    places = (8 * UNIT / MARGIN) ** 2 * sum(size**2 for size in value.shape[2:])
    first, *others = tried(call)
    return [first + places * difference.square(), *others]


def _squashed(call: Call) -> Tensor:
    """Sigmoid and tanh, by their slope; where an error is large, by how much the slope changes within the margin.

    No error is larger than all that lies between their ends. A sigmoid may be computed as a quotient next to a half, so
    that it is off by a share of 1 however small it is.
    """
    spread = torch.as_tensor(call.variance(call.args[0])).sqrt()
    if call.func.overloadpacket in (_aten.sigmoid, _aten.sigmoid_):
        slope, bend, ends = call.result * (1 - call.result), _BEND_OF_SIGMOID, 1.0
        own = torch.ones_like(call.result)
    else:
        slope, bend, ends = 1 - call.result.square(), _BEND_OF_TANH, 2.0
        own = call.result
    passed_on: Tensor = (slope * spread + (MARGIN / 2) * bend * spread.square()).clamp_max(ends / MARGIN)
    return passed_on.square() + (2 * UNIT * own).square()


def _next_to_one(call: Call) -> list[Tensor]:
    """An operator that adds 1 to what may be small or nearly -1: what is lost is a share of 1, not of the result."""
    value = call.args[0]
    scaled = call.func.overloadpacket in (_aten.gelu, _aten.mish, _aten.silu, _aten.silu_)
    factor = value if scaled else torch.ones_like(value)
    first, *others = tried(call)
    return [first + (2 * UNIT * factor).square(), *others]


def _converted(call: Call) -> Any:
    """Another type of number: a whole one that may be off stays so."""
    if not call.args[0].is_floating_point():
        return _clamped(call)
    return [variance.float() for variance in tried(call)]


def _picked(call: Call) -> list[Tensor]:
    """One of two values; where rounding may decide which, they are apart by their difference."""
    condition, one, other = call.args
    first, *others = tried(call)
    if call.inexact(condition):
        first = first + (call.variance(condition) > 0) * ((one - other) / MARGIN).square()
    return [first, *others]


_aten = torch.ops.aten
RULES: dict[Any, Callable[[Call], Any]] = {
    operator: rule
    for rule, operators in {
        _added: (_aten.add, _aten.add_, _aten.sub, _aten.sub_),
        _averaged: (_aten.mean, _aten.avg_pool2d, _aten._adaptive_avg_pool2d),
        _clamped: (
            *(_aten.relu, _aten.relu_, _aten.clamp, _aten.clamp_),
            *(_aten.clamp_min, _aten.hardtanh, _aten.hardtanh_),
            _aten.round,  # of an activation quantiser, whose levels are compared by themselves
        ),
        _convolved: (_aten.convolution,),
        _converted: (_aten._to_copy,),
        _copied: (_aten.copy_,),
        _new: (_aten.new_empty, _aten.empty_like, _aten.new_zeros, _aten.zeros_like),
        _interpolated: (_aten.upsample_linear1d, _aten.upsample_bilinear2d, _aten.upsample_bicubic2d),
        moved: (
            *(_aten.view, _aten._unsafe_view, _aten.permute, _aten.transpose, _aten.t, _aten.slice, _aten.select),
            *(_aten.squeeze, _aten.unsqueeze, _aten.expand, _aten.cat, _aten.stack, _aten.split, _aten.clone),
            *(_aten.split_with_sizes, _aten.alias, _aten.detach, _aten.flip),
            *(_aten.unbind, _aten.unsafe_split, _aten.transpose_),
            _aten.max_pool2d_with_indices,
        ),
        _looked_up: (_aten.embedding,),
        _next_to_one: (
            *(_aten.gelu, _aten.mish, _aten.elu, _aten.softplus, _aten.log_sigmoid_forward, _aten._log_softmax),
            *(_aten.silu, _aten.silu_),
        ),
        _padded: (_aten.constant_pad_nd,),
        _picked: (_aten.where,),
        _multiplied: (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm),
        _sampled: (_aten.grid_sampler_2d,),
        _recurrent: (_aten.mkldnn_rnn_layer,),
        _squashed: (_aten.sigmoid, _aten.sigmoid_, _aten.tanh, _aten.tanh_),
        _scaled: (_aten.mul, _aten.mul_, _aten.div),
        _normalised: (_aten.native_batch_norm, _aten._native_batch_norm_legit_no_training),
    }.items()
    for operator in operators
}
