"""The bound on float32 rounding holds, against the same computation in float64; and it is not so wide as to be useless.

Every operator that has a rule, and some that have none, stand in one of two tables of cases, and every property is
checked for every case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import Phase, Verbosity, given, settings
from hypothesis import strategies as st
from seen import Seen
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tqexport.backends.onnx.session import OnnxSession
from tqexport.verification import rounding_rules
from tqexport.verification.rounding import RoundingErrors
from tqexport.verification.rounding_rules import MARGIN, UNIT

aten = torch.ops.aten
same_examples = settings(  # quiet: the name of the case says more than its numbers
    max_examples=12, derandomize=True, deadline=None, database=None, phases=[Phase.generate], verbosity=Verbosity.quiet
)

SMALLEST, LARGEST = 1e-6, 1e6  # magnitudes of what is drawn, apart from zeros
NEXT_TO_NOTHING = 1e-18  # what a bound may be where there is no error
JUMPS = "a small error becomes a whole step; levels are compared by themselves"
SUMS = 150  # a dot product of any order, of weights that may be off themselves, has a wide bound
DRAWS = 150  # of errors put into the inputs of a case
SIZES = {"b": (1, 3), "c": (1, 9), "h": (5, 9), "i": (1, 6), "j": (1, 6), "k": (1, 400), "l": (9, 40), "m": (1, 5)}


@dataclass(frozen=True)
class Case:
    """Something to compute, in float32 and in float64.

    Attributes:
        compute: Takes the tensors ``inexact`` and then ``fixed``.
        inexact: Shapes of what depends on the sample: a letter is a size of :data:`SIZES`, a digit is itself.
        fixed: Shapes of weights.
        loose: How many times the largest error that is met, or the unit of the largest result, the bound may be.
        wild: Whether any magnitude will do; otherwise numbers as they are in a network.
        passes: At least this share of the variance that is carried is there.
        tried: Whether the fallback computes the variance, by trying a few times: so it is right on average only.
        jumps: Whether a small error may become a whole step.
    """

    compute: Callable[..., Tensor]
    inexact: Sequence[str] = ("ij",)
    fixed: Sequence[str] = ()
    loose: float = 25
    wild: bool = True
    passes: float = 0.5
    tried: bool = False
    jumps: bool = False


def convolution(inexact: str, weight: str, loose: float = SUMS, bias: bool = False, **geometry: Any) -> Case:
    call = (F.conv1d, F.conv2d)[len(inexact) - 3]
    return Case(lambda *x: call(*x, **geometry), [inexact], _with_bias(weight, weight[0], bias), loose)


def transposed(inexact: str, weight: str, loose: float = SUMS, bias: bool = False, **geometry: Any) -> Case:
    call = (F.conv_transpose1d, F.conv_transpose2d)[len(inexact) - 3]
    channels = str(int(weight[1]) * geometry.get("groups", 1)) if bias else ""
    return Case(lambda *x: call(*x, **geometry), [inexact], _with_bias(weight, channels, bias), loose)


def _with_bias(weight: str, channels: str, bias: bool) -> list[str]:
    return [weight, channels] if bias else [weight]


CONVOLUTIONS = {
    "1-D": convolution("b3l", "235"),
    "1-D, padded, strided": convolution("b3l", "235", padding=2, stride=3),
    "1-D, depthwise": convolution("b4l", "413", groups=4, padding=1),
    "2-D": convolution("bchh", "4c33"),
    "2-D, with bias": convolution("b3hh", "2332", bias=True),
    "2-D, 1 by 1": convolution("bchh", "4c11"),
    "2-D, padded, strided, dilated": convolution("b3hh", "4333", padding=2, stride=2, dilation=2),
    "2-D, uneven": convolution("b3hh", "4325", padding=(0, 2), stride=(2, 1)),
    "2-D, grouped": convolution("b4hh", "6233", groups=2, padding=1),
    "2-D, depthwise": convolution("b4hh", "4133", groups=4, padding=1, stride=2),
    "2-D, depthwise, two outputs each": convolution("b3hh", "6133", groups=3),
}
TRANSPOSED = {
    "1-D": transposed("b3l", "325"),
    "1-D, grouped": transposed("b4l", "423", groups=2, stride=2, padding=1),
    "2-D": transposed("bchh", "c433"),
    "2-D, with bias": transposed("b3hh", "3232", bias=True),
    "2-D, strided, padded": transposed("b3hh", "3433", stride=2, padding=1, output_padding=1),
    "2-D, stride wider than the kernel": transposed("b3hh", "3422", stride=3, output_padding=1),
    "2-D, dilated": transposed("b3hh", "3433", stride=2, dilation=2, padding=2),
    "2-D, grouped": transposed("b4hh", "4333", groups=2, stride=2),
    "2-D, grouped, with bias": transposed("b4hh", "4333", groups=2, bias=True),
    "2-D, depthwise": transposed("b4hh", "4133", groups=4, stride=2, padding=1),
}
ALL_CONVOLUTIONS = CONVOLUTIONS | {f"transposed, {name}": case for name, case in TRANSPOSED.items()}
POOLS = {
    "windows of 2": Case(lambda x: F.avg_pool2d(x, 2), ["bc88"], passes=0, loose=80),
    "windows that overlap": Case(lambda x: F.avg_pool2d(x, 5, stride=1), ["bc88"], passes=0, loose=80),
    "with padding": Case(lambda x: F.avg_pool2d(x, 3, stride=2, padding=1), ["bc88"], passes=0, loose=80),
    "without counting padding": Case(
        lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False), ["bc88"], passes=0, loose=80
    ),
    "divided by another number": Case(lambda x: F.avg_pool2d(x, 2, divisor_override=3), ["bc88"], passes=0, loose=80),
}


def normalisation(call: Callable[..., Any], weight: bool = True) -> Case:
    def compute(x: Tensor, mean: Tensor, spread: Tensor, *affine: Tensor) -> Tensor:
        result: Tensor = call(x, *(affine or (None, None)), mean, spread.abs())[0]
        return result

    return Case(compute, ["b4hh"], ["4"] * (4 if weight else 2), 60)


def _with_part(x: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    result[2:5] = 3.0 * x[2:5]
    return result + x


def interpolation(inexact: str, **how: Any) -> Case:
    return Case(lambda x: F.interpolate(x, **how), [inexact], loose=SUMS, wild=False, passes=0, tried=True)


def eval_mode(*args: Any) -> Any:
    return aten.native_batch_norm(*args, False, 0.1, 1e-5)


def no_training(*args: Any) -> Any:
    return aten._native_batch_norm_legit_no_training(*args, 0.1, 1e-5)


def squashed(compute: Callable[..., Tensor]) -> Case:
    return Case(compute, loose=SUMS, wild=False, passes=0)


def recurrence(call: Callable[..., Any], gates: int, inexact: str = "9m4", biases: bool = True, **how: Any) -> Case:
    """Sequences of four numbers through a recurrent layer with two, in both directions."""

    def compute(x: Tensor, *weights: Tensor) -> Tensor:
        state = x.new_zeros(2, x.shape[1], 2)
        states = (state, state) if call is torch.lstm else state
        result: Tensor = call(x, states, [w / 2 for w in weights], biases, 1, 0.0, False, True, False)[0]
        return result

    shapes = [f"{2 * gates}4", f"{2 * gates}2", *[f"{2 * gates}"] * 2 * biases]
    return Case(compute, [inexact], [*shapes, *shapes], SUMS, wild=False, passes=0, tried=True, **how)


# By the operator that has a rule, what is computed with it.
RULES: dict[Any, dict[str, Case]] = {
    aten.add: {
        "two": Case(lambda x, y: x + y, ["ij", "ij"]),
        "broadcast": Case(lambda x, y: x + y, ["ij", "j"]),
        "a number": Case(lambda x: x + 0.75),
        "a constant": Case(lambda x, y: y + x, ["ij"], ["ij"]),
        "a multiple": Case(lambda x, y: torch.add(x, y, alpha=-2.5), ["ij", "ij"]),
        "a multiple of a number": Case(lambda x: aten.add.Scalar(x, 0.75, 3)),
    },
    aten.add_: {
        "two": Case(lambda x, y: x.clone().add_(y), ["ij", "ij"]),
        "to a constant": Case(lambda x, y: y.clone().add_(x), ["ij"], ["ij"]),
    },
    aten.sub: {
        "two": Case(lambda x, y: x - y, ["ij", "ij"]),
        "a multiple": Case(lambda x, y: torch.sub(x, y, alpha=0.3125), ["ij", "ij"]),
    },
    aten.sub_: {"two": Case(lambda x, y: x.clone().sub_(y), ["ij", "ij"])},
    aten.mean: {
        "rows": Case(lambda x: x.mean(1), ["ik"], passes=0, loose=400),
        "everything": Case(lambda x: x.mean(), ["ik"], passes=0, loose=2000),
        "images": Case(lambda x: x.mean((2, 3), keepdim=True), ["bchh"], passes=0, loose=180),
    },
    aten.avg_pool2d: POOLS,
    aten._adaptive_avg_pool2d: {
        "to 2 by 2": Case(lambda x: aten._adaptive_avg_pool2d(x, [2, 2]), ["bc88"], passes=0, loose=80)
    },
    aten.relu: {"": Case(torch.relu, passes=0)},
    aten.relu_: {"": Case(lambda x: x.clone().relu_(), passes=0)},
    aten.clamp: {
        "to numbers": Case(lambda x: x.clamp(-0.5, 1), passes=0, loose=80),
        "to constants": Case(lambda x, y: torch.clamp(x, min=y), ["ij"], ["ij"], passes=0),
        "by what is inexact": Case(lambda x, y: torch.clamp(y, min=x), ["ij"], ["ij"], passes=0, loose=80, tried=True),
    },
    aten.clamp_: {"": Case(lambda x: x.clone().clamp_(-0.5, 1), passes=0, loose=80)},
    aten.clamp_min: {"": Case(lambda x: aten.clamp_min(x, 0.25), passes=0)},
    aten.hardtanh: {"": Case(F.relu6, passes=0)},
    aten.hardtanh_: {"": Case(lambda x: aten.hardtanh_(x.clone(), -1, 1), passes=0, loose=80)},
    aten.round: {"": Case(torch.round, passes=0, jumps=True)},
    aten.convolution: {
        **ALL_CONVOLUTIONS,
        "weights that depend on the sample": Case(F.conv2d, ["b3hh", "4333"], loose=SUMS, passes=0.2, tried=True),
    },
    aten.view: {"": Case(lambda x: x.view(-1))},
    aten._unsafe_view: {"": Case(lambda x: aten._unsafe_view(x, [-1]))},
    aten.permute: {"": Case(lambda x: x.permute(2, 0, 1), ["ijm"])},
    aten.transpose: {"": Case(lambda x: x.transpose(0, 1))},
    aten.t: {"": Case(lambda x: x.t())},
    aten.slice: {"": Case(lambda x: x[:, 1:7:2], ["il"])},
    aten.select: {"": Case(lambda x: x.select(0, 0))},
    aten.squeeze: {
        "one": Case(lambda x: x.squeeze(1), ["i1j"]),
        "all": Case(lambda x: x.squeeze(), ["i1j"]),
    },
    aten.unsqueeze: {"": Case(lambda x: x.unsqueeze(1))},
    aten.expand: {"": Case(lambda x: x.expand(-1, 4), ["i1"])},
    aten.cat: {
        "two": Case(lambda x, y: torch.cat([x, y], 1), ["ij", "im"]),
        "a constant": Case(lambda x, y: torch.cat([y, x, y], 1), ["ij"], ["im"]),
    },
    aten.stack: {"": Case(lambda x, y: aten.stack([x, y], 1), ["ij", "ij"])},
    aten.split: {"": Case(lambda x: aten.split(x, 2, 1)[1], ["il"])},
    aten.split_with_sizes: {"": Case(lambda x: aten.split_with_sizes(x, [1, 3], 1)[1], ["i4"])},
    aten.clone: {"": Case(torch.clone)},
    aten.alias: {"": Case(lambda x: aten.alias(x))},
    aten.detach: {"": Case(lambda x: x.detach())},
    aten.flip: {"": Case(lambda x: x.flip(1))},
    aten.constant_pad_nd: {
        "zeros": Case(lambda x: F.pad(x, (1, 2))),
        "another number": Case(lambda x: F.pad(x, (1, 2), value=-3.5)),
    },
    aten.max_pool2d_with_indices: {
        "": Case(lambda x: F.max_pool2d(x, 3, 2, 1), ["bchh"], passes=0),
    },
    aten.embedding: {
        "a table": Case(lambda x, w: F.embedding((x > 0).long(), w), ["ij"], ["2m"], SUMS, passes=0, jumps=True),
        "of what is inexact": Case(lambda w: F.embedding(torch.tensor([1, 0, 1]), w), ["2m"], loose=SUMS, tried=True),
    },
    aten.mm: {
        "weights": Case(torch.mm, ["ik"], ["km"], SUMS),
        "weights first": Case(lambda x, w: w.mm(x), ["km"], ["ik"], SUMS),
        "two": Case(torch.mm, ["ik", "km"], loose=SUMS),
    },
    aten.addmm: {
        "linear": Case(F.linear, ["ik"], ["mk", "m"], loose=300),  # sums in more parts where there is AVX-512: 264
        "a bias that depends on the sample": Case(torch.addmm, ["im", "ik", "km"], loose=SUMS),
        "multiples": Case(
            lambda x, y, c: torch.addmm(c, x, y, beta=3, alpha=-2.5), ["i9"], ["9m", "im"], SUMS, passes=0.2, tried=True
        ),
    },
    aten.bmm: {
        "weights": Case(torch.bmm, ["bik"], ["bkm"], SUMS),
        "two": Case(torch.bmm, ["bik", "bkm"], loose=SUMS),
    },
    aten.mul: {
        "a number": Case(lambda x: x * -0.3125),
        "a constant": Case(lambda x, y: x * y, ["ij"], ["ij"]),
        "by what is inexact": Case(lambda x, y: y * x, ["ij"], ["ij"]),
        "two": Case(lambda x, y: x * y, ["ij", "ij"], passes=0.25, loose=50),
        "broadcast": Case(lambda x, y: x * y, ["ijm", "i11"], passes=0.25),
        "itself": Case(lambda x: x * x),
    },
    aten.div: {
        "a number": Case(lambda x: x / 3.0),
        "a constant": Case(lambda x, y: x / (y.abs() + 0.125), ["ij"], ["ij"], wild=False),
        "by what is inexact": Case(lambda x, y: y / (x * x + 0.5), ["ij"], ["ij"], wild=False),
        "two": Case(lambda x, y: x / (y * y + 0.5), ["ij", "ij"], wild=False, passes=0.25),
        "rounded": Case(lambda x: torch.div(x, 0.25, rounding_mode="floor"), loose=80, jumps=True),
    },
    aten.mul_: {
        "two": Case(lambda x, y: x.clone().mul_(y), ["ij", "ij"], passes=0.25, loose=50),
        "of a constant": Case(lambda x, y: y.clone().mul_(x), ["ij"], ["ij"]),
    },
    aten.mkldnn_rnn_layer: {
        "an LSTM": recurrence(torch.lstm, 4),
        "without biases": recurrence(torch.lstm, 4, biases=False),
    },
    aten.sigmoid: {"": squashed(torch.sigmoid), "far out": squashed(lambda x: torch.sigmoid(16 * x))},
    aten.sigmoid_: {"": squashed(lambda x: x.clone().sigmoid_())},
    aten.tanh: {"": squashed(torch.tanh), "far out": squashed(lambda x: torch.tanh(4 * x))},
    aten.tanh_: {"": squashed(lambda x: x.clone().tanh_())},
    aten.unsafe_split: {
        "a GRU": recurrence(torch.gru, 3),
        "a GRU without biases": recurrence(torch.gru, 3, biases=False),
    },
    aten.unbind: {"a recurrent layer without gates": recurrence(torch.rnn_tanh, 1)},
    aten.transpose_: {"": Case(lambda x: x.clone().transpose_(0, 1))},
    aten.copy_: {
        "circular padding": Case(lambda x: F.pad(x, (2, 2), mode="circular"), ["b39"]),
        "circular padding of a sum": Case(lambda x: F.pad(x + 0.75, (1, 2), mode="circular"), ["b39"]),
        "a part": Case(_with_part, ["9"]),
    },
    aten.new_empty: {"filled": Case(lambda x: x.new_empty(x.shape).copy_(x), ["ij"])},
    aten.empty_like: {"filled": Case(lambda x: torch.empty_like(x).copy_(x), ["ij"])},
    aten.new_zeros: {"added to": Case(lambda x: x.new_zeros(x.shape).add_(x), ["ij"])},
    aten.zeros_like: {"added to": Case(lambda x: torch.zeros_like(x).add_(x), ["ij"])},
    aten.grid_sampler_2d: {
        "by a constant grid": Case(
            lambda x, grid: F.grid_sample(x, 1.2 * grid.tanh(), align_corners=False),
            ["2ch9"],
            ["2552"],
            loose=400,
            wild=False,
            passes=0,
            tried=True,
        ),
    },
    aten.upsample_linear1d: {
        "twice": interpolation("bcl", scale_factor=2.0, mode="linear"),
        "by aligned ends": interpolation("bcl", size=23, mode="linear", align_corners=True),
    },
    aten.upsample_bilinear2d: {
        "twice": interpolation("bchh", scale_factor=2.0, mode="bilinear"),
        "by aligned corners": interpolation("bchh", size=(13, 24), mode="bilinear", align_corners=True),
    },
    aten.upsample_bicubic2d: {
        "to another shape": interpolation("bchh", size=(13, 24), mode="bicubic"),
    },
    aten.native_batch_norm: {
        "with weights": normalisation(eval_mode),
        "without": normalisation(eval_mode, weight=False),
    },
    aten._native_batch_norm_legit_no_training: {
        "with weights": normalisation(no_training),
        "without": normalisation(no_training, weight=False),
    },
}


def fallback(compute: Callable[..., Tensor], inexact: str = "ij", fixed: Sequence[str] = (), **about: Any) -> Case:
    return Case(compute, [inexact], fixed, **{"loose": SUMS, "wild": False, "passes": 0, "tried": True} | about)


# Operators that have no rule, or none for what they are given here.
FALLBACK = {
    "exp": fallback(torch.exp),
    "silu": fallback(F.silu),
    "silu in place": fallback(lambda x: F.silu(x.clone(), inplace=True)),
    "hardswish": fallback(F.hardswish),
    "gelu": fallback(lambda x: F.gelu(4 * x)),
    "gelu near zero": fallback(lambda x: F.gelu(x / 64)),
    "elu": fallback(F.elu),
    "mish": fallback(F.mish),
    "softplus": fallback(F.softplus),
    "log of a sigmoid": fallback(F.logsigmoid),
    "leaky relu": fallback(F.leaky_relu),
    "a power": fallback(lambda x: x**3),
    "another type": fallback(lambda x: x.double().float()),
    "a root": fallback(lambda x: (x.abs() + 0.25).sqrt()),
    "one minus": fallback(lambda x: 1 - x),
    "the larger": fallback(torch.maximum, "ij", ["ij"]),
    "where": fallback(lambda x: torch.where(x > 0, x, 0.125 * x)),
    "sum": fallback(lambda x: x.sum(1), "ik"),
    "sum and product": fallback(torch.baddbmm, "bim", ["bi9", "b9m"], passes=0.5),
    "matrix by vector": fallback(lambda x, y: torch.mv(y, x), "9", ["i9"]),
    "softmax": fallback(lambda x: F.softmax(x, 1), "il"),
    "softmax of large numbers": fallback(lambda x: F.softmax(64 * x, 1), "il", loose=1000),
    "log_softmax": fallback(lambda x: F.log_softmax(8 * x, 1), "il"),
    "softmax of a part": fallback(lambda x: F.softmax(x.masked_fill(torch.arange(9) % 3 > 0, -math.inf), 1), "i9"),
    "layer norm": fallback(lambda x: F.layer_norm(x, x.shape[1:]), "il"),
    "layer norm far from zero": fallback(lambda x: F.layer_norm(x + 64, x.shape[1:]), "il"),
    "group norm": fallback(lambda x: F.group_norm(x, 2), "b4hh"),
    "instance norm": fallback(F.instance_norm, "bchh"),
    "attention": fallback(lambda x: F.scaled_dot_product_attention(x, 2 * x, 1 - x), "i84"),
    "gathered": fallback(lambda x: x[:, [0, 2, 2]], "il"),
}

RULE_CASES = [
    pytest.param(operator, case, id=f"{operator.__name__}: {name}".rstrip(": "))
    for operator, cases in RULES.items()
    for name, case in cases.items()
]
ALL_CASES = [case.values[1] for case in RULE_CASES] + list(FALLBACK.values())
ALL_NAMES = [str(case.id) for case in RULE_CASES] + list(FALLBACK)


def of_all_cases(test: Any) -> Any:
    return pytest.mark.parametrize("case", ALL_CASES, ids=ALL_NAMES)(test)


# What is drawn.


def normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


@st.composite
def values(draw: st.DrawFn, shape: Sequence[int], wild: bool) -> Tensor:
    """A tensor of one of the kinds that are hard on sums."""
    kind = draw(st.sampled_from(["normal", "positive", "mixed", "cancelling", "some zeros", "zeros", "constant"]))
    seed = draw(st.integers(0, 2**32))
    x = normal(shape, seed)
    if kind == "positive":
        x = x.abs()
    elif kind == "mixed" and wild:
        x = x * 10.0 ** (3 * normal(shape, seed + 1))
    elif kind == "cancelling" and shape:
        half = x.shape[-1] // 2
        x[..., half : 2 * half] = -x[..., :half]
    elif kind == "some zeros":
        x[normal(shape, seed + 1) > 0] = 0
    elif kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "constant":
        x = torch.full(shape, x.flatten()[0].item())
    if wild:
        x = x * 10.0 ** draw(st.integers(-6, 6))
    return torch.where(x == 0, 0, x.sign() * x.abs().clamp(SMALLEST, LARGEST))


def shapes(case: Case, choose: Callable[[tuple[int, int]], int]) -> list[tuple[int, ...]]:
    texts = [*case.inexact, *case.fixed]
    sizes = {letter: choose(SIZES[letter]) for letter in sorted(set("".join(texts))) if letter in SIZES}
    return [tuple(sizes.get(letter) or int(letter) for letter in text) for text in texts]


@st.composite
def arguments(draw: st.DrawFn, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """What depends on the sample, and what does not."""
    tensors: list[Tensor] = []
    for shape in shapes(case, lambda ends: draw(st.integers(*ends))):
        x = draw(values(shape, case.wild))
        if tensors and x.shape == tensors[0].shape and draw(st.booleans()):  # nearly the opposite of another
            x = -tensors[0] * (1 + x / x.abs().max().clamp_min(SMALLEST) / 1024)
        tensors.append(x)
    return tensors[: len(case.inexact)], tensors[len(case.inexact) :]


def usual(case: Case, seed: int, largest: int = 1000) -> tuple[list[Tensor], list[Tensor]]:
    """Normally distributed arguments of the largest sizes."""
    tensors = [normal(s, 10 * seed + i) for i, s in enumerate(shapes(case, lambda ends: min(ends[1], largest)))]
    return tensors[: len(case.inexact)], tensors[len(case.inexact) :]


# What is compared.


def in_float32(
    compute: Callable[..., Tensor], inexact: Sequence[Tensor], fixed: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """The result of a computation, and the bound on its error."""
    with torch.no_grad(), RoundingErrors() as errors:
        result = compute(*[errors.exact(x.clone()) for x in inexact], *fixed)
    return result, errors.bound(result)


def in_both(
    compute: Callable[..., Tensor], inexact: Sequence[Tensor], fixed: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """The error of a float32 computation, and the bound on it; both float64."""
    result, bound = in_float32(compute, inexact, fixed)
    assert bound.shape == result.shape
    assert result.dtype == bound.dtype == torch.float32
    expected = compute(*[x.double() for x in inexact], *[x.double() for x in fixed])
    return (result.double() - expected).abs().nan_to_num(0.0), bound.double()  # NaN in both: infinities


def assert_within(error: Tensor, bound: Tensor) -> None:
    assert (error <= bound).all(), f"off by {error.max():.2e}, {(error / bound).nan_to_num(0).max():.3g} of the bound"


def after_an_error(case: Case, inexact: Sequence[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A computation whose inputs are what remains of a difference that cancels, so that they have a large error."""
    factors = [0.3 + normal(x.shape, i).abs() for i, x in enumerate(inexact)]
    share = 1e-3 if case.wild else 1e-2
    inputs = [x / share for x in inexact]
    taken = [x * f * (1 - share) for x, f in zip(inputs, factors, strict=True)]

    def compute(*tensors: Tensor) -> Tensor:
        first, fixed = tensors[: len(inexact)], tensors[len(inexact) :]
        constants = [(f.to(x.dtype), t.to(x.dtype)) for f, t, x in zip(factors, taken, first, strict=True)]
        return case.compute(*[x * f - t for x, (f, t) in zip(first, constants, strict=True)], *fixed)

    return compute, inputs


# The promise: what rounding does stays within the bound.


@of_all_cases
@same_examples
@given(data=st.data())
def test_rounding_stays_within_the_bound(case: Case, data: st.DataObject) -> None:
    inexact, fixed = data.draw(arguments(case))
    assert_within(*in_both(case.compute, inexact, fixed))


@of_all_cases
@same_examples
@given(data=st.data())
def test_an_error_that_goes_in_comes_out_within_the_bound(case: Case, data: st.DataObject) -> None:
    if case.jumps:
        pytest.skip(JUMPS)
    inexact, fixed = data.draw(arguments(case))
    compute, inexact = after_an_error(case, inexact)
    assert_within(*in_both(compute, inexact, fixed))


@same_examples
@given(st.integers(0, 255), st.floats(0.01, 100), values((3, 64), wild=False), st.integers(0, 2**32))
def test_a_weight_may_be_computed_from_its_code_in_two_ways(zero: int, largest: float, x: Tensor, seed: int) -> None:
    """Its error is a share of the largest weight, however small it is itself, and alike wherever one code stands."""
    scale = torch.tensor(largest / 255)
    offset = -zero * scale
    codes = torch.from_numpy(np.random.default_rng(seed).choice(256, (5, 64), p=np.full(256, 1 / 256)))
    codes[1:] = torch.where(normal((4, 64), seed) < torch.tensor([[-9.0], [0], [1], [9]]), codes[1:], zero)
    weight = codes * scale + offset
    exact = codes * scale.double() + offset.double()
    with torch.no_grad(), RoundingErrors() as errors:
        result = F.linear(errors.exact(x), weight)
    assert_within((result - F.linear(x.double(), exact)).abs(), errors.bound(result).double())


@pytest.mark.parametrize("power", range(-40, 16, 5))
def test_very_small_and_very_large_numbers_have_a_bound(power: int) -> None:
    compute = lambda x: F.softmax((x * 1.5).relu() / 3, 1)[:, :4] + 0.75 * x[:, :4] * x[:, :4]  # noqa: E731
    assert_within(*in_both(compute, [normal((20, 30), 0) * 10.0**power]))


def test_at_the_end_of_what_an_operator_is_defined_for_there_is_a_bound() -> None:
    error, bound = in_both(lambda x: (0.75 * x).relu().sqrt(), [normal((20, 30), 0)])
    assert_within(error, bound)
    assert bound.isfinite().all()


def test_a_softmax_that_is_nearly_zero_has_a_bound() -> None:
    error, bound = in_both(lambda x: F.softmax(x, 1), [normal((20, 30), 0) * 40])
    assert_within(error, bound)
    assert bound.min() < 1e-15


@pytest.mark.parametrize("operator", ["Sigmoid", "Tanh"])
def test_gates_by_onnxruntime_stay_within_the_bound_however_far_out_they_are(operator: str) -> None:
    x = torch.linspace(-40, 40, 4001)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4001]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], ["y"])], "gate", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 20)]
    content = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    (computed,) = OnnxSession(content).run((x.numpy(),))
    expected, bound = in_float32(getattr(torch, operator.lower()), [x])
    assert_within((torch.from_numpy(computed) - expected).abs(), bound)


# The promise: the bound is no wider than it must be.


@of_all_cases
@pytest.mark.parametrize("before", [False, True], ids=["of exact inputs", "of inputs with an error"])
def test_the_bound_is_not_far_above_the_largest_error(case: Case, before: bool) -> None:
    if before and case.jumps:
        pytest.skip(JUMPS)
    largest = widest = 0.0
    for seed in range(4):
        inexact, fixed = usual(case, seed)
        compute, inexact = after_an_error(case, inexact) if before else (case.compute, inexact)
        result, _ = in_float32(compute, inexact, fixed)
        error, bound = in_both(compute, inexact, fixed)
        largest = max(largest, error.max().item(), UNIT * result.abs().max().item())
        widest = max(widest, bound.max().item())
    assert widest <= case.loose * largest, f"{widest / largest:.3g} times"


@of_all_cases
def test_errors_come_out_with_the_variance_that_is_carried(case: Case) -> None:
    """An error that is known, and so large that rounding is nothing beside it, is put into the inputs at random."""
    if case.jumps:
        pytest.skip(JUMPS)
    inexact, fixed = usual(case, 0, largest=9)
    size = 1e-5 if case.tried else 1e-4  # trials enlarge it
    deviations = [size * (0.5 + normal(x.shape, i).abs()) for i, x in enumerate(inexact)]
    with torch.no_grad(), RoundingErrors() as errors:
        for x, deviation in zip(inexact, deviations, strict=True):
            errors.exact(x)
            errors._variances[x] = deviation.square()
        carried = (errors.bound(case.compute(*inexact, *fixed)).double() / MARGIN).square()

    exact, weights = [x.double() for x in inexact], [x.double() for x in fixed]
    expected, generator = case.compute(*exact, *weights), torch.Generator().manual_seed(0)
    observed = torch.zeros_like(expected)
    for _ in range(DRAWS):
        moved = [x + d * torch.randn(x.shape, generator=generator) for x, d in zip(exact, deviations, strict=True)]
        observed += (case.compute(*moved, *weights) - expected).nan_to_num(0.0).square() / DRAWS
    if case.tried:
        observed, carried = observed.mean(), carried.mean()
    assert (observed <= 1.6 * carried + NEXT_TO_NOTHING).all(), (
        f"{(observed / carried).max():.3g} times what is carried"
    )
    assert (observed >= case.passes * carried - NEXT_TO_NOTHING**2).all(), (
        f"only {(observed / carried).min():.3g} of what is carried"
    )


# The rules, in numbers: variances in squares of the unit of rounding.


def assert_carried(compute: Callable[..., Tensor], *inexact: Tensor, variances: Sequence[float] | Tensor) -> None:
    _, bound = in_float32(compute, inexact)
    carried = (bound.double() / MARGIN * 2**24).square()
    np.testing.assert_allclose(carried.flatten(), torch.as_tensor(variances).flatten(), rtol=1e-3, atol=1e-3)


THREE, FOUR = torch.tensor([3.0]), torch.tensor([4.0])


def test_the_unit_is_the_largest_share_that_rounding_to_float32_changes() -> None:
    assert np.finfo(np.float32).eps / 2 == UNIT
    assert MARGIN == 8


def test_a_sum_a_product_and_a_quotient_are_rounded_once() -> None:
    assert_carried(torch.add, THREE, FOUR, variances=[7**2])
    assert_carried(torch.sub, THREE, FOUR, variances=[1])
    assert_carried(torch.mul, THREE, FOUR, variances=[12**2])
    assert_carried(torch.div, THREE, FOUR, variances=[0.75**2])


def test_the_variances_of_a_sum_are_added() -> None:
    assert_carried(lambda x, y: 2 * x - y / 2, THREE, FOUR, variances=[6**2 + 2**2 + 4**2])


def test_a_multiple_is_rounded_before_it_is_added() -> None:
    alpha = 0.5
    expected = 6**2 + alpha**2 * 8**2 + (alpha * 8) ** 2 + (6 + alpha * 8) ** 2
    assert_carried(lambda x, y: torch.add(2 * x, 2 * y, alpha=alpha), THREE, FOUR, variances=[expected])
    assert_carried(lambda x: aten.sub.Scalar(x, 4, alpha), THREE, variances=[2**2 + 1])


def test_an_error_is_multiplied_by_what_its_value_is_multiplied_by() -> None:
    assert_carried(lambda x: (2 * x) * 5, THREE, variances=[5**2 * 6**2 + 30**2])
    assert_carried(lambda x: (2 * x) / 5, THREE, variances=[6**2 / 5**2 + 1.2**2])


def test_the_errors_of_two_factors_are_taken_to_be_alike() -> None:
    assert_carried(lambda x, y: (2 * x) * (2 * y), THREE, FOUR, variances=[(8 * 6 + 6 * 8) ** 2 + 48**2])
    assert_carried(lambda x, y: (2 * x) / (2 * y), THREE, FOUR, variances=[(6 / 8 + 8 * 6 / 8**2) ** 2 + 0.75**2])


def test_a_mean_rounds_the_sums_of_its_terms() -> None:
    mean = lambda x: x.mean(1)  # noqa: E731
    assert_carried(mean, torch.tensor([[1.0, 2, 6]]), variances=[3 * 3**2 + (1 + 4 + 36) / 3])
    assert_carried(mean, torch.tensor([[3.0, 0, -3]]), variances=[(9 + 9) / 3])
    assert_carried(lambda x: F.avg_pool2d(x, 3, 1), torch.ones(1, 1, 3, 4), variances=[18 + 1, 18 + 1])


def test_the_errors_in_a_mean_are_taken_to_be_alike() -> None:
    own = 3 * 6**2 + (4 + 16 + 144) / 3
    assert_carried(lambda x: (2 * x).mean(1), torch.tensor([[1.0, 2, 6]]), variances=[(4 + 16 + 144) / 3 + own])


def of_partial_sums(terms: int, largest: float, squares: Any, sums: Any, result: Any) -> Any:
    """The second term of the formula of a dot product, in squared units."""
    alike = torch.as_tensor(terms * sums**2 / (largest**2 * squares)).nan_to_num(0.0)
    return torch.maximum(terms * torch.as_tensor(result**2), alike * (sums**2 + result**2)) / 9


def test_a_dot_product_has_the_error_of_the_formula() -> None:
    x, weight, bias = torch.tensor([[3.0, 4, 0]]), torch.tensor([[1.0, -2, 1]]), torch.tensor([7.0])
    of_weights, of_inputs = (2 * 2) ** 2 * 3 * (9 + 16), 1 * 6**2 + 4 * 8**2
    linear = lambda x: F.linear(x, weight)  # noqa: E731
    without, with_bias = (of_weights + of_partial_sums(3, 2, 25, -5, result) for result in (-5, 2))
    assert_carried(linear, x, variances=[without])
    assert_carried(lambda x: F.linear(x, weight, bias), x, variances=[with_bias])
    assert_carried(lambda x: linear(2 * x), x, variances=[4 * without + of_inputs])


@pytest.mark.parametrize("terms", [9, 49, 1000, 20_000])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_equal_terms_are_rounded_alike(terms: int, share: float) -> None:
    """A filter of 1 bit on a flat part of a picture, added in order, with a bias or without."""
    worst = 0.0
    for value in torch.linspace(0.5, 2, 20).tolist():
        x, weight = torch.full((1, terms), value), torch.full((1, terms), 0.7)
        weight[0, int(share * terms) :] *= -1
        products = (x * weight).numpy()[0]
        for bias in (None, torch.tensor([0.3])):
            with torch.no_grad(), RoundingErrors() as errors:
                bound = float(errors.bound(F.linear(errors.exact(x), weight, bias)))
            first = [] if bias is None else bias.tolist()
            in_order = np.cumsum(np.array([*first, *products], np.float32), dtype=np.float32)[-1]
            exact = sum(first) + float(products.astype(np.float64).sum())
            worst = max(worst, abs(float(in_order) - exact) / bound)
    assert 0.01 < worst < 1


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_mean_of_equal_terms_is_within_the_bound_of_onnxruntime(size: int) -> None:
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [make("AveragePool", ["x"], ["y"], kernel_shape=[size, size])]
    ends = [[value(name, onnx.TensorProto.FLOAT, (1, 16, *side))] for name, side in (("x", [size] * 2), ("y", [1, 1]))]
    graph = onnx.helper.make_graph(nodes, "graph", *ends)
    opset = onnx.helper.make_opsetid("", 18)
    session = OnnxSession(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString())
    for number in torch.linspace(0.5, 2, 20).tolist():
        x = torch.full((1, 16, size, size), number)
        with torch.no_grad(), RoundingErrors() as errors:
            result = F.avg_pool2d(errors.exact(x), size)
            bound = errors.bound(result).numpy()
        assert (np.abs(session.run((x.numpy(),))[0] - result.numpy()) <= bound).all()


def test_of_a_product_the_right_factor_has_the_largest_weight() -> None:
    left, right = torch.tensor([[1.0, -2, 1]]), torch.tensor([[3.0], [4], [0]])
    own = (2 * 8) ** 2 * 3 * (1 + 4 + 1) + of_partial_sums(3, 8, 6, -10, -10)
    assert_carried(lambda x: left.mm(2 * x), right, variances=[own + 1 * 6**2 + 4 * 8**2])


def test_what_is_added_to_a_product_brings_its_error() -> None:
    left, right = torch.tensor([[3.0, 4]]), torch.tensor([[1.0], [2]])
    own = (2 * 2) ** 2 * 2 * 25 + of_partial_sums(2, 2, 25, 11, 17)
    assert_carried(lambda x: torch.addmm(2 * x, left, right), THREE.view(1, 1), variances=[6**2 + own])


@pytest.mark.parametrize("case", ALL_CONVOLUTIONS.values(), ids=ALL_CONVOLUTIONS)
def test_a_convolution_is_the_dot_products_that_it_consists_of(case: Case) -> None:
    (x,), (weight, *bias) = usual(case, 0, largest=9)
    x = x[:1]
    each_input = torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape[1:])
    reaches = (case.compute(each_input, weight.double()) != 0).double()
    result = case.compute(x.double(), weight.double(), *[each.double() for each in bias])[0]
    terms = weight.numel() // len(result)
    assert reaches.sum(0).max() <= terms
    squares = torch.einsum("i...,i->...", reaches, x.flatten().double().square())
    largest = float(weight.abs().max())
    sums = result - sum(each.double().view(-1, *[1] * (result.dim() - 1)) for each in bias)
    expected = (2 * largest) ** 2 * terms * squares + of_partial_sums(terms, largest, squares, sums, result)
    assert_carried(lambda x: case.compute(x, weight, *bias), x, variances=expected)


def test_a_batch_norm_may_be_multiplied_out() -> None:
    weight, bias, mean, spread = (torch.tensor([each]) for each in (6.0, 1.0, 2.0, 16.0))
    gain, x = 1.5, THREE.view(1, 1)
    norm = lambda x: aten.native_batch_norm(x, weight, bias, mean, spread, False, 0.1, 0.0)[0]  # noqa: E731
    assert_carried(norm, x, variances=[2**2 * (gain**2 * 3**2 + gain**2 * 2**2 + 1**2)])
    doubled = 2**2 * (gain**2 * 6**2 + gain**2 * 2**2 + 1**2) + gain**2 * 6**2
    assert_carried(lambda x: norm(2 * x), x, variances=[doubled])


def test_moving_and_clamping_add_nothing() -> None:
    x = torch.tensor([[1.0, -2, 3]])
    assert_carried(lambda x: (2 * x).t().relu().clamp(0, 4), x, variances=[4, 16, 36])
    assert_carried(lambda x: (2.25 * x).round(), x, variances=(2.25 * x).square())


def test_the_largest_of_a_window_may_have_the_largest_error_of_it() -> None:
    window = torch.tensor([[[[1.0, -3], [2, 0]]]])
    assert_carried(lambda x: F.max_pool2d(2 * x, 2), window, variances=[6**2])


def test_padding_has_no_error_whatever_it_is_filled_with() -> None:
    for value in (0.0, 5.0, -5.0, -math.inf):
        padded = lambda x, value=value: F.pad(2 * x, (1, 1), value=value)  # noqa: E731
        assert_carried(padded, THREE, variances=[0, 6**2, 0])


def test_without_a_rule_the_operator_is_tried_on_inputs_that_are_off_by_four_roundings() -> None:
    x = normal((1000,), 0)
    for compute, deviation in ((torch.neg, 4 * x), (lambda x: torch.neg(2 * x), (4**2 + 1) ** 0.5 * 2 * x)):
        result, bound = in_float32(compute, [x])
        effect = ((bound.double() / MARGIN / UNIT).square() - (4 * result.double()).square()).sqrt() / deviation.abs()
        assert effect.max() < 1.26  # of the 1.25 standard deviations that a trial may be off
        assert 1.05 < effect.median() < 1.2
        assert effect.quantile(0.001) > 0.4


def test_errors_of_two_inputs_that_may_cancel_are_not_taken_to_cancel() -> None:
    _, bound = in_float32(lambda x: x.mv(torch.tensor([1.0, -1.0])), [torch.ones(10_000, 2)])
    assert bound.min() > MARGIN * UNIT


# What is kept, of which tensors.


@of_all_cases
def test_results_are_what_they_are_without_a_bound(case: Case) -> None:
    inexact, fixed = usual(case, 0)
    with torch.no_grad():
        expected = case.compute(*inexact, *fixed)
        with RoundingErrors() as errors:
            inputs, weights = [errors.exact(x.clone()) for x in inexact], [x.clone() for x in fixed]
            result = case.compute(*inputs, *weights)
    assert torch.equal(result, expected)
    assert all(torch.equal(x, y) for x, y in zip(inputs + weights, inexact + fixed, strict=True))


def test_what_does_not_depend_on_an_exact_tensor_has_no_bound() -> None:
    with torch.no_grad(), RoundingErrors() as errors:
        x = errors.exact(torch.ones(3))
        weight = torch.full((3,), 1.1) * 1.7
        result = x * weight
    assert not errors.bound(weight).any()
    assert not errors.layers(weight)
    assert not errors.bound(result * 3).any()  # computed after the block
    assert errors.bound(result).all()


def test_an_exact_tensor_has_no_error_even_if_it_had_one() -> None:
    with torch.no_grad(), RoundingErrors() as errors:
        x = errors.exact(torch.ones(3))
        y = 1.1 * x
        errors.mark(y, "first")
        assert errors.exact(y) is y
        assert errors.layers(y) == ()
        assert (errors.bound(y) < NEXT_TO_NOTHING).all()
        assert (errors.bound(y.view(1, 3)) < NEXT_TO_NOTHING).all()


def test_layers_are_those_on_the_way_in_order() -> None:
    with torch.no_grad(), RoundingErrors() as errors:
        x = errors.exact(torch.ones(1, 3))
        a, b = 1.1 * x, 1.2 * x
        errors.mark(a, "a")
        errors.mark(b, "b")
        c = (a + x).relu() - b
        assert errors.layers(c) == ("a", "b")
        errors.mark(c, "c")
        assert errors.layers(torch.cat([b, c])) == ("b", "a", "c")
        assert errors.layers(torch.sigmoid(c)) == ("a", "b", "c")
        assert errors.layers(x) == errors.layers(2 * x) == ()


def test_every_result_of_an_operator_has_its_own_error() -> None:
    with torch.no_grad(), RoundingErrors() as errors:
        x = 3 * errors.exact(torch.arange(6.0))
        errors.mark(x, "x")
        first, second = x.split([2, 4])
    assert torch.equal(torch.cat([errors.bound(first), errors.bound(second)]), errors.bound(x))
    assert errors.layers(first) == errors.layers(second) == ("x",)


def test_integers_and_truth_values_have_no_bound_and_what_is_made_of_them_has_that_of_its_own_rounding() -> None:
    with torch.no_grad(), RoundingErrors() as errors:
        x = 3.3 * errors.exact(torch.arange(6.0).view(2, 3))
        largest, where = x.max(1)
        results = [x.argmax(1), where, x.int(), x > 1, x.isfinite()]
        assert not any(errors.bound(each).any() for each in results)
        for each in results:
            scaled = each.float() * 1.1
            assert (errors.bound(scaled) <= 1e-6 * scaled.abs() + 1e-15).all()
        table = torch.rand(6, 4)
        summed = F.embedding(where, table) @ torch.rand(4, 3)
        assert errors.bound(summed).all()  # a product in front of which whole numbers chose the values
    assert errors.bound(largest).all()


@pytest.mark.parametrize(
    ("in_place", "out_of_place"),
    [
        (lambda x, y: x.add_(y), torch.add),
        (lambda x, y: x.sub_(y), torch.sub),
        (lambda x, y: x.add_(y).relu_(), lambda x, y: (x + y).relu()),
        (lambda x, y: x.sub_(y).clamp_(-1, 1), lambda x, y: (x - y).clamp(-1, 1)),
        (lambda x, y: x.mul_(y), torch.mul),
        (lambda x, y: x.add_(y).sigmoid_(), lambda x, y: (x + y).sigmoid()),
        (lambda x, y: x.add_(y).exp_(), lambda x, y: (x + y).exp()),
    ],
    ids=["add_", "sub_", "relu_", "clamp_", "mul_", "sigmoid_", "without a rule"],
)
@pytest.mark.parametrize("depends", [True, False])
def test_in_place_operators_have_the_error_of_the_others(in_place: Any, out_of_place: Any, depends: bool) -> None:
    bounds = []
    for compute in (in_place, out_of_place):
        with torch.no_grad(), RoundingErrors() as errors:
            x, y = torch.arange(4.0) - 2, 1.1 * errors.exact(torch.arange(4.0))
            if depends:
                x = 3.3 * errors.exact(x)
            result = compute(x, y)
            assert (result is x) == (compute is in_place)
        bounds.append(errors.bound(result))
    assert bounds[0].any()
    assert torch.equal(*bounds)


def test_a_number_that_stands_for_minus_infinity_leaves_the_others_their_bounds() -> None:
    """A running maximum begins with it, as that of RWKV does."""
    with torch.no_grad(), RoundingErrors() as errors:
        x = 1.1 * errors.exact(torch.arange(6.0))
        least = torch.zeros_like(x) - 1e38
        highest = torch.maximum(least + x, x)
        weighed = torch.exp(least - highest) * x + torch.exp(x - highest) * x
    for value in (highest, weighed):
        bound = errors.bound(value)
        assert torch.equal(value, x)
        assert (bound <= 1e-4 * (1 + x)).all()
        assert bound[1:].all()


def test_a_view_is_taken_whatever_the_memory_format_is() -> None:
    generator = torch.Generator().manual_seed(0)
    x, filters = torch.randn(2, 3, 6, 6, generator=generator), torch.randn(3, 1, 3, 3, generator=generator)
    with RoundingErrors() as errors:
        value = F.conv2d(errors.exact(x).to(memory_format=torch.channels_last), filters, groups=3)
        places = value.flatten(2).transpose(1, 2).contiguous()
        of_value, of_places = errors.bound(value), errors.bound(places.view(-1))
    assert torch.equal(of_value.flatten(2).transpose(1, 2).flatten(), of_places)


def test_the_bound_is_the_same_every_time() -> None:
    x = normal((20, 30), 0)
    bounds = []
    for _ in range(2):
        with torch.no_grad(), RoundingErrors() as errors:
            bounds.append(errors.bound(F.layer_norm(1.1 * errors.exact(x), (30,))))
    assert torch.equal(*bounds)


# The tables are complete.


def operators(case: Case) -> set[Any]:
    inexact, fixed = usual(case, 0)
    with torch.no_grad(), Seen() as seen:
        case.compute(*inexact, *fixed)
    return seen.operators


@pytest.mark.parametrize(("operator", "case"), RULE_CASES)
def test_every_case_runs_its_operator(operator: Any, case: Case) -> None:
    assert operator in operators(case)


def test_every_rule_has_a_case() -> None:
    covered = set(RULES).union(*[operators(case) for case in FALLBACK.values()])
    assert set(rounding_rules.RULES) <= covered
