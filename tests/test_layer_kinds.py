"""The table of layer kinds says what PyTorch and the formats have."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from places import ROOT
from torch import nn

from tqexport import prepare
from tqexport.layer_kinds import FILTER_OPERATORS, LAYER_KINDS, ONNX_OPERATORS, kind_of


def a_layer(kind):
    """A layer of a kind, from 2 channels to 4; attention has queries, keys and values of 4."""
    if kind.name == "MultiheadAttention":
        return nn.MultiheadAttention(4, 2)
    return getattr(nn, kind.name)(2, 4, *([3] if kind.name.startswith("Conv") else []))


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.name)
def test_a_row_names_the_parameters_and_their_output_channels(kind):
    layer = a_layer(kind)
    for parameter in kind.parameters_of(layer):
        shape = getattr(layer, parameter).shape
        sizes = {"MultiheadAttention": (12, 4), "LSTM": (16, 2), "GRU": (12, 2)}.get(kind.name, (4, 2))
        if parameter.startswith("weight_hh"):  # for the state
            sizes = (sizes[0], 4)
        assert (shape[kind.output_axis], shape[1 - kind.output_axis]) == sizes


def test_a_layer_may_lack_some_of_the_parameters():
    kind = kind_of(nn.MultiheadAttention(4, 2))
    assert kind.parameters_of(nn.MultiheadAttention(4, 2)) == ("in_proj_weight",)
    others = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    assert kind.parameters_of(nn.MultiheadAttention(4, 2, kdim=3)) == others
    assert kind.parameters_of(prepare(nn.MultiheadAttention(4, 2, kdim=3), (8,), float_layers=[])) == others


def test_a_recurrent_layer_has_them_of_every_layer_and_direction():
    kind = kind_of(nn.GRU(2, 4))
    names = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse", "weight_ih_l1")
    layer = nn.GRU(2, 4, 2, bidirectional=True)
    assert kind.parameters_of(layer)[:5] == names
    assert kind.parameters_of(prepare(layer, (8,), float_layers=[])) == kind.parameters_of(layer)


def test_the_page_says_which_kinds_are_quantised():
    page = (ROOT / "docs" / "your-network.md").read_text(encoding="utf-8")
    section = page.partition("## What is quantised")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [kind.name for kind in LAYER_KINDS]


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.name)
def test_a_layer_is_of_its_kind_quantised_or_not_and_so_are_those_derived_from_it(kind):
    layer = a_layer(kind)
    derived = type("Derived", (type(layer),), {})
    assert kind_of(layer) is kind_of(prepare(layer, (8,), float_layers=[])) is kind
    assert kind_of(derived.__new__(derived)) is kind
    assert kind_of(nn.Bilinear(1, 1, 1)) is kind_of(nn.ReLU()) is None


def test_onnx_has_the_operators():
    assert all(onnx.defs.has(name) for name in ONNX_OPERATORS)


@pytest.mark.parametrize("operator", FILTER_OPERATORS.values(), ids=FILTER_OPERATORS)
def test_a_weight_becomes_a_filter_and_comes_back(operator):
    shape = (2, 3, 5, 7, 4)[: len(operator.axes)]
    torch_shape = [shape[axis] for axis in operator.torch_axes]
    weight = np.arange(np.prod(shape)).reshape(torch_shape)
    stored = operator.from_torch(weight, shape)
    assert stored.shape == shape
    assert np.array_equal(stored.transpose(operator.torch_axes), weight)
    gains = operator.per_channel(np.arange(shape[operator.channel_axis]))
    assert (stored * gains).shape == shape
    assert gains.shape[operator.channel_axis] == shape[operator.channel_axis]
