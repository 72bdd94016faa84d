"""Which filter of the converted file is which weight is known, where the numbers alone do not tell."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exactness import assert_exact
from networks import model_of, randomize_, samples_for
from torch import nn

from tqexport import prepare
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite import convert
from tqexport.training.quantizers import quantized_weights
from tqexport.verification.comparison import compare

WIDTHS = (1, 4, 8)


class TwoDepthwise(nn.Module):
    """Two depthwise convolutions with one weight per channel: each is a multiple of the other, channel by channel."""

    def __init__(self):
        super().__init__()
        self.first, self.norm0, self.act0 = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.one = nn.Conv2d(6, 6, 1, groups=6, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(6), nn.ReLU()
        self.other = nn.Conv2d(6, 6, 1, groups=6)
        self.norm2, self.act2 = nn.BatchNorm2d(6), nn.ReLU()
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.act0(self.norm0(self.first(x)))
        x = self.act1(self.norm1(self.one(x)))
        x = self.act2(self.norm2(self.other(x)))
        return self.last(x).mean((2, 3))


class TwoColumns(nn.Module):
    """Two linear layers of one input, likewise."""

    def __init__(self):
        super().__init__()
        self.first, self.act0 = nn.Linear(5, 1), nn.ReLU()
        self.one, self.act1 = nn.Linear(1, 7), nn.ReLU()
        self.middle, self.act2 = nn.Linear(7, 1), nn.ReLU()
        self.other, self.act3 = nn.Linear(1, 7), nn.ReLU()
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = self.act1(self.one(self.act0(self.first(x))))
        x = self.act3(self.other(self.act2(self.middle(x))))
        return self.last(x)


NETWORKS = {"depthwise": (TwoDepthwise, (2, 6, 5)), "one input": (TwoColumns, (5,))}


def prepared(factory):
    network = randomize_(prepare(factory(), WIDTHS, float_layers=["first", "last"]), 3)
    weights = quantized_weights(network)
    assert weights["one.weight"].original.shape == weights["other.weight"].original.shape
    return network


@pytest.mark.parametrize(("factory", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_layers_with_one_weight_per_channel_are_told_apart(factory, shape):
    assert_exact(prepared(factory), shape, WIDTHS)


@pytest.mark.parametrize(("factory", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_verification_would_see_them_mixed_up(factory, shape, monkeypatch):
    """So the test above proves something."""
    model = model_of(prepared(factory), shape, (4,))
    original = convert.put_codes_back
    swapped = {"one.weight": "other.weight", "other.weight": "one.weight"}

    def mixed_up(flat, weights, origins, kernel):
        by_name = {weight.name: weight for weight in weights}
        others = [
            type(weight)(name, *(getattr(by_name[swapped.get(name, name)], part) for part in PARTS))
            for name, weight in by_name.items()
        ]
        original(flat, others, origins, kernel)

    monkeypatch.setattr(convert, "put_codes_back", mixed_up)
    ((_, content),) = export_onnx(model, (4,))
    (mixed,) = convert.convert_to_tflite([onnx.load_from_string(content)])
    x = samples_for(model, 3)
    found = compare(model, 4, run_file(mixed, x), x)
    assert found.codes_wrong > 0
    assert np.isfinite(run_file(mixed, x).output).all()


PARTS = ("codes", "shift", "scale", "offset", "bits")
