"""Whole numbers that rounding may change, and those that it may not."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_exact
from seen import Seen
from torch import Tensor, nn

from tqexport import prepare
from tqexport.verification.choices import CHOICES
from tqexport.verification.rounding import RoundingErrors

STEP = 2.0**-9  # values are so many that neighbours are often equal, or one rounding apart

OPERATORS = {
    "argmax": lambda x: x.argmax(1),
    "argmax of all": lambda x: x[0].argmax(),
    "argmin with its axis": lambda x: x.argmin(0, keepdim=True),
    "maximum": lambda x: x.max(1)[1],
    "minimum": lambda x: x.min(0)[1],
    "sort": lambda x: x.sort(1)[1],
    "backwards": lambda x: x.sort(0, descending=True)[1],
    "stable": lambda x: x.sort(dim=1, stable=True)[1],
    "the largest": lambda x: x.topk(5)[1],
    "the smallest": lambda x: x.topk(3, 0, largest=False)[1],
    "larger": lambda x: x > 0.25,
    "larger than another": lambda x: x >= x.flip(0),
    "less": lambda x: x.lt(0.5),
    "not less": lambda x: x.le(x.roll(1, 1)),
    "equal": lambda x: x == 0.75,
    "another": lambda x: x != 0.75,
    "whole": lambda x: (64 * x).int(),
    "true": lambda x: (x - 0.5).bool(),
    "in another shape": lambda x: (x > 0.25).T.reshape(-1).long().float(),
}


def two_ways(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of which few sums are equal, and the same sum in two orders; most terms leave a rounding behind."""
    random = torch.Generator().manual_seed(seed)
    x = torch.rand((24, 64), generator=random)
    w = (torch.rand((64, 24), generator=random) / 64 / STEP).round() * STEP * 1.1
    w[:, 1] = w[:, 0]  # a tie
    order = torch.randperm(64, generator=random)
    return x, w, order


@pytest.mark.parametrize("name", OPERATORS)
def test_what_two_orders_of_a_sum_decide_otherwise_is_within_the_bound(name: str) -> None:
    choose = OPERATORS[name]
    within = loose = different = 0
    for seed in range(40):
        x, w, order = two_ways(seed)
        with torch.no_grad(), RoundingErrors() as errors:
            chosen = choose(errors.exact(x) @ w)
        bound = errors.bound(chosen)
        with torch.no_grad():
            exact = (x.double() @ w.double()).float()
            others = [choose(exact), choose(sum(x[:, i, None] * w[i] for i in order.tolist()))]
        for other in others:
            difference = (chosen.double() - other.double()).abs()
            different += int((difference > 0).sum())
            assert (difference <= bound).all()
        loose += int((bound > 0.5).sum())
        within += chosen.numel()
    assert loose < 0.4 * within  # most of them are told exactly
    assert loose or "largest" not in name or different == 0


def test_where_numbers_are_exact_nothing_is_loose_but_the_order_of_equal_ones() -> None:
    x = torch.tensor([[3.0, 1.0, 3.0, 2.0, 0.0]])
    with torch.no_grad(), RoundingErrors() as errors:
        value = errors.exact(x)
        for each in (value.argmax(1), value.max(1)[1], value > 1, value == 3, value.int(), value.argmin()):
            assert not errors.bound(each).any()
        assert errors.bound(value.topk(3)[1]).tolist() == [[4, 4, 0]]
        assert errors.bound(value.sort()[1]).tolist() == [[0, 0, 0, 4, 4]]


def test_what_is_picked_by_a_doubtful_choice_may_be_either() -> None:
    with torch.no_grad(), RoundingErrors() as errors:
        x = errors.exact(torch.tensor([1.0, 2.0, 3.0])) * 1.1
        mask = x > x * torch.tensor([1.0, 0.5, 2.0])
        picked = torch.where(mask, x, -x)
        masked = mask.float() * 5
    assert [value > 1 for value in errors.bound(picked).tolist()] == [True, False, False]
    assert [value > 4.9 for value in errors.bound(masked).tolist()] == [True, False, False]


def test_every_operator_has_a_case() -> None:
    with torch.no_grad(), Seen() as seen:
        for choose in OPERATORS.values():
            choose(torch.rand(24, 24))
    assert set(CHOICES) <= seen.operators


class Places(nn.Module):
    """Places of the largest logits of a network with many equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.act = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.middle(self.act(self.first(x))))).flatten(1).topk(5, 1)[1]


def test_places_of_equal_values_in_any_order_are_right() -> None:
    torch.manual_seed(0)
    assert_exact(prepare(Places(), (1, 8)), (3, 8, 7), (1, 8))
