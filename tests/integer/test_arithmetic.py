"""The pieces of the integer arithmetic, against PyTorch and against plain statements of what they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tqexport.integer.arithmetic import ROUNDINGS, add, average, requantize
from tqexport.integer.grids import Grid
from tqexport.integer.halves import parts
from tqexport.integer.model import Window
from tqexport.integer.windows import convolve, maximum


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_is_within_half_a_level_and_a_hair_of_the_real_product(rounding):
    generator = np.random.default_rng(0)
    sums = generator.integers(-40_000, 40_000, 5000)
    target = Grid(0.05, 128)
    found = requantize(sums, 0.01, 0.02, target, rounding).astype(float)
    real = np.clip(sums * (0.01 * 0.02 / 0.05) + 128, 0, 255)
    assert np.abs(found - real).max() <= 0.5 + 0.02


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_sums_and_means_are_within_a_hair_of_half_a_level(rounding):
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 256, (2, 4000)).astype(np.uint8)
    first, second, target = Grid(0.02, 100), Grid(0.013, 7), Grid(0.03, 80)
    real = ((a - 100.0) * 0.02 + (b - 7.0) * 0.013) / 0.03 + 80
    assert np.abs(add(a, first, b, second, target, rounding) - np.clip(real, 0, 255)).max() <= 0.501
    sums = generator.integers(-16 * 100, 16 * 155, 4000)
    real = np.clip(sums * (0.02 / 0.03 / 16) + 80, 0, 255)
    assert np.abs(average(sums, 16, first, target, rounding) - real).max() <= 0.501


@pytest.mark.parametrize("rounding", ["litert", "tflm"])
@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0, 2.0**13, 2.0**40])
def test_sums_that_leave_every_grid_end_at_its_ends(rounding, factor):
    """64 bits hold no product of three large numbers; what is shifted left is cut first."""
    sums = np.array([-(2**31), -(2**30), -65_536, -300, 0, 300, 65_536, 2**30, 2**31 - 1])
    found = requantize(sums, 1.0, factor, Grid(1.0, 100), rounding)
    assert found.tolist() == [0, 0, 0, 0, 100, 255, 255, 255, 255]


def test_halves_round_to_even_up_or_away_from_zero():
    target = Grid(1.0, 128)
    halves = 4 * np.array([-3, -1, 1, 3, 5])
    levels = {rounding: requantize(halves, 0.125, 1.0, target, rounding).astype(int) - 128 for rounding in ROUNDINGS}
    assert levels["real"].tolist() == levels["xnnpack"].tolist() == [-2, 0, 0, 2, 2]
    # a factor of exactly 1/8 is one of 1/2 and a shift by two
    assert levels["litert"].tolist() == [-1, 0, 1, 2, 3]
    assert levels["tflm"].tolist() == [-2, -1, 1, 2, 3]


def test_every_nine_bit_weight_is_a_sum_of_three_small_ones():
    weight = np.arange(-255, 256, dtype=np.int16).reshape(1, -1, 1, 1)
    pieces = parts(weight)
    assert np.array_equal(sum(pieces), weight)
    assert all(np.abs(piece).max() <= 127 for piece in pieces)
    assert np.count_nonzero(pieces[2]) == 2


@pytest.mark.parametrize(("stride", "dilation", "groups"), list(itertools.product((1, 2), (1, 2), (1, 2, 4))))
def test_convolutions_are_those_of_pytorch(stride, dilation, groups):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (2, 4, 9, 8)).astype(np.float64)
    weight = generator.integers(-127, 128, (8, 4 // groups, 3, 2)).astype(np.float64)
    window = Window((3, 2), (stride,) * 2, ((1, 1), (2, 2)), (dilation,) * 2)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x), torch.from_numpy(weight), None, stride, (1, 2), dilation, groups
    )
    assert np.array_equal(convolve(x, weight, window, groups), expected.numpy())


def test_maxima_are_those_of_pytorch():
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 7, 6)).astype(np.uint8)
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(x).float(), 3, 2, 1)
    assert np.array_equal(maximum(x, Window((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))), expected.numpy())
