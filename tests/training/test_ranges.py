"""Quantisers whose range is learned: what they round to, how the range is found and learned, and where they stand."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tqexport import RangeQuantizer, at_width, joint_backward, load_float_weights, prepare
from tqexport.analysis.readiness import parts_of
from tqexport.errors import UsageError
from tqexport.model import CheckpointInfo, TruncModel
from tqexport.networks.candidate import Candidate
from tqexport.training.ranges import ranges_of
from tqexport.truncation import WIDTHS, range_levels


def quantizer_of(size, *, signed=True, bits=4):
    quantizer = RangeQuantizer(signed=signed).eval()
    quantizer.range.data.fill_(size)
    quantizer.bits = bits
    return quantizer


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(WIDTHS), st.booleans(), st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_there_are_as_many_levels_as_codes_and_zero_is_one_of_them(bits, signed, size, seed):
    quantizer = quantizer_of(size, signed=signed, bits=bits)
    x = 2 * size * torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        rounded = quantizer(x)
        low, high, per_one = quantizer.grid()
        assert quantizer(torch.zeros(2)).tolist() == [0, 0]
    assert len(rounded.unique()) <= 1 << bits
    levels = rounded * per_one
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    inside = (x >= low) & (x <= high)
    assert ((rounded - x)[inside].abs() * per_one <= 0.5001).all()
    lowest, highest, _ = range_levels(bits, signed=signed)
    assert (levels.round()[x < low] == lowest).all()
    assert (levels.round()[x > high] == highest).all()


def test_a_step_of_a_width_is_what_a_shift_leaves():
    assert [range_levels(bits, signed=True) for bits in WIDTHS] == [
        *((0, 1, 2), (-2, 1, 2), (-4, 3, 4), (-8, 7, 8)),
        *((-16, 15, 16), (-32, 31, 32), (-64, 63, 64), (-128, 127, 128)),
    ]
    assert [range_levels(bits, signed=False) for bits in (1, 4, 8)] == [(0, 1, 1), (0, 15, 15), (0, 255, 255)]


@pytest.mark.parametrize(("signed", "bits"), [(True, 4), (True, 1), (False, 3)])
def test_the_gradients_are_those_of_lsq(signed, bits):
    quantizer = quantizer_of(1.5, signed=signed, bits=bits)
    x = (3 * torch.randn(500, generator=torch.Generator().manual_seed(0))).requires_grad_()
    rounded = quantizer(x)
    upstream = torch.randn(500, generator=torch.Generator().manual_seed(1))
    (rounded * upstream).sum().backward()
    low, high, _ = (value.detach() for value in quantizer.grid())
    inside = (x >= low) & (x <= high)
    torch.testing.assert_close(x.grad, upstream * inside)
    per_range = torch.where(inside, rounded - x, rounded).detach() / 1.5  # of the range, r d/dr
    _, _, steps = range_levels(bits, signed=signed)
    expected = (upstream * per_range).sum() / (500 * steps) ** 0.5
    torch.testing.assert_close(quantizer.range.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_first_batch_of_training_sets_the_range_and_no_other():
    quantizer = RangeQuantizer(signed=True)
    start = float(quantizer.range.detach())
    quantizer.eval()(torch.ones(10))
    assert float(quantizer.range.detach()) == start
    quantizer.train()(torch.zeros(10))  # which says nothing
    assert float(quantizer.range.detach()) == start
    quantizer(torch.tensor([2.0, -2.0]))
    assert float(quantizer.range.detach()) == 6
    quantizer(100 * torch.ones(10))
    assert float(quantizer.range.detach()) == 6
    loaded = RangeQuantizer(signed=True)
    loaded.load_state_dict(quantizer.state_dict())
    loaded(100 * torch.ones(10))
    assert float(loaded.range.detach()) == 6
    unsigned = RangeQuantizer(signed=False)
    unsigned(torch.tensor([2.0, -100.0]))
    assert float(unsigned.range.detach()) == 6


def perceptron():
    return nn.Sequential(
        *(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 16)),
        *(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)),
    )


def test_training_learns_ranges_and_lowers_the_loss():
    torch.manual_seed(0)
    network = prepare(perceptron(), (2, 8), learned_ranges=True)
    x = torch.randn(256, 4)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs()], 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses, ranges = [], []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(joint_backward(network, x, y, (2, 8), nn.functional.mse_loss))
        optimizer.step()
        ranges.append([float(quantizer.range.detach()) for quantizer in ranges_of(network).values()])
    assert losses[-1] < 0.5 * losses[0]
    assert all(abs(last - first) > 0.01 for first, last in zip(ranges[0], ranges[-1], strict=True))


def test_inputs_are_rounded_where_no_relu_stands_in_front_or_where_the_names_say():
    network = prepare(perceptron(), learned_ranges=True)
    assert {name: quantizer.signed for name, quantizer in ranges_of(network).items()} == {
        "2.input_quantizer": True,
        "3": False,
        "7.input_quantizer": True,
        "8": False,
    }
    named = prepare(perceptron(), learned_ranges=["5"])
    assert [*ranges_of(named)] == ["3", "5.input_quantizer", "8"]
    with pytest.raises(UsageError, match=r"learned_ranges names \['0'\], but the quantised layers that take numbers"):
        prepare(perceptron(), learned_ranges=["0"])
    with pytest.raises(UsageError, match="quantize_activations=False does not have"):
        prepare(perceptron(), learned_ranges=True, quantize_activations=False)
    with pytest.raises(UsageError, match="integer=True does not have"):
        prepare(perceptron(), learned_ranges=True, integer=True, input_shape=(4,))
    table = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert [*ranges_of(prepare(table, float_layers=["2"], learned_ranges=True))] == ["1.input_quantizer"]


@pytest.mark.parametrize("by_name", [False, True])
def test_attention_rounds_each_of_its_inputs_once(by_name):
    torch.manual_seed(0)
    network = prepare(nn.MultiheadAttention(8, 2, batch_first=True), (4,), float_layers=[], learned_ranges=True).eval()
    x, calls = torch.randn(2, 3, 8), []
    network.input_quantizer.register_forward_hook(lambda _module, args, output: calls.append((args[0], output)))
    plain = copy.deepcopy(network)
    plain._forward_pre_hooks.clear()
    with torch.no_grad(), at_width(network, 4), at_width(plain, 4):
        out, _ = network(query=x, key=x, value=x) if by_name else network(x, x, x)
        rounded = network.input_quantizer(x)
        expected, _ = plain(rounded, rounded, rounded)
    assert len(calls) == 2  # of which one was by hand
    torch.testing.assert_close(out, expected)


def test_an_encoder_layer_of_pytorch_is_rounded_in_evaluation_too():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    prepared = prepare(layer, float_layers=[], learned_ranges=True).eval()
    calls = []
    assert "self_attn.out_proj.input_quantizer" not in ranges_of(prepared)  # attention never calls it
    for name, quantizer in ranges_of(prepared).items():
        quantizer.register_forward_hook(lambda _module, _args, _output, name=name: calls.append(name))
    with torch.no_grad(), at_width(prepared, 2):
        prepared(torch.randn(2, 3, 4))
    assert calls == ["self_attn.input_quantizer", "linear1.input_quantizer", "linear2.input_quantizer"]


def test_float_weights_fit_a_network_that_learns_ranges():
    trained = perceptron()
    assert (
        str(load_float_weights(prepare(perceptron(), learned_ranges=True), trained.state_dict())) == "everything fits"
    )


def test_without_the_option_a_network_has_the_keys_that_it_had():
    assert not [key for key in prepare(perceptron()).state_dict() if "range" in key or "input_quantizer" in key]


def test_check_names_what_is_rounded():
    model = TruncModel(prepare(perceptron(), (8,), learned_ranges=True).eval(), CheckpointInfo("test", {}, (4,), (8,)))
    parts = {part.name: part.kind for part in parts_of(Candidate(model, prepared_here=False)) if not part.shape}
    assert parts["2.input_quantizer"] == "input"
    assert parts["3"] == "ReLU"
