"""Convolutions that pad with something else than zeros: the padding is an operator of its own in a file."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_exact
from torch import nn

from tqexport import prepare

WIDTHS = (1, 4, 8)


def picture(mode):
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, (3, 5), padding="same", padding_mode=mode), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6 * 6 * 7, 4)),
    )


def sequence(mode):
    return nn.Sequential(
        *(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Conv1d(6, 4, 3, stride=2, padding=2, padding_mode=mode), nn.BatchNorm1d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 7, 3)),
    )


@pytest.mark.parametrize(("network", "shape"), [(picture, (3, 8, 9)), (sequence, (3, 13))])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_quantised_layer_that_pads_is_exact(network, shape, mode):
    torch.manual_seed(2)
    assert_exact(prepare(network(mode), WIDTHS), shape, WIDTHS)


def test_zeros_around_negative_numbers_stay_zeros_where_the_largest_is_taken():
    """onnxruntime makes one operator of these, which pads with minus infinity."""
    torch.manual_seed(2)
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ZeroPad2d((1, 2, 1, 0)), nn.MaxPool2d(3, 2), nn.Conv2d(6, 4, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 4, 3)),
    )
    with torch.no_grad():
        network[0].bias -= 2
    assert_exact(prepare(network, WIDTHS), (3, 10, 9), WIDTHS)
