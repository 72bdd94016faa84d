"""MultiheadAttention: one weight for queries, keys and values, or three; its out_proj is a layer that nobody calls."""

from __future__ import annotations

import onnx
import pytest
import torch
from damage import changed_tflite, flip_a_bit
from exactness import assert_exact, verdicts
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, InputInfo, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.training.quantizers import quantized_weights

WIDTHS = (1, 4, 8)
SHAPE = (5, 6)


class Attending(nn.Module):
    """Self-attention between two linear layers."""

    def __init__(self, *, need_weights=True, **options):
        super().__init__()
        self.first, self.act = nn.Linear(6, 8), nn.ReLU()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.last, self.need_weights = nn.Linear(8, 3), need_weights

    def forward(self, x):
        x = self.act(self.first(x))
        return self.last(self.attention(x, x, x, need_weights=self.need_weights)[0])


class Crossing(nn.Module):
    """Attention to another sequence, of other sizes where ``sizes`` says so."""

    def __init__(self, **sizes):
        super().__init__()
        self.first, self.act = nn.Linear(6, 8), nn.ReLU()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.last = nn.Linear(8, 3)

    def forward(self, x, memory, values):
        return self.last(self.attention(self.act(self.first(x)), memory, values)[0])


def prepared(network):
    torch.manual_seed(4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return prepare(network, WIDTHS).eval()


def test_without_the_weights_of_attention_and_without_biases_it_is_exact():
    network = prepared(Attending(need_weights=False, bias=False))
    assert list(quantized_weights(network)) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert_exact(network, SHAPE, WIDTHS)


def test_weights_of_other_sizes_are_exact():
    network = prepared(Crossing(kdim=7, vdim=6))
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    assert list(quantized_weights(network)) == [f"attention.{name}" for name in names]
    inputs = (InputInfo("x", SHAPE), InputInfo("memory", (4, 7)), InputInfo("values", (4, 6)))
    assert_exact(network, inputs, WIDTHS)


def test_attention_to_another_sequence_is_exact_and_has_each_code_once():
    network = prepared(Crossing())
    inputs = (InputInfo("x", SHAPE), InputInfo("memory", (4, 8)), InputInfo("values", (4, 8)))
    files = assert_exact(network, inputs, WIDTHS)
    content = files[4][1]
    flat = FlatModel(content)
    names = [name for i in range(len(flat.graph.tensors)) if (name := flat.name(i)).endswith(".codes")]
    parts = [f"attention.in_proj_weight[{start}:{start + 8}].codes" for start in (0, 8, 16)]
    assert sorted(names) == sorted([*parts, "attention.out_proj.weight.codes"])
    model = TruncModel(network, CheckpointInfo("test", {}, inputs, WIDTHS))
    for start, part in zip((0, 8, 16), parts, strict=True):
        for verdict in verdicts(model, changed_tflite(content, part, flip_a_bit), 4):
            words = f"layer attention.in_proj_weight: 1 of 192 codes differ, first at ({start + 2}, 1)"
            assert verdict.problems[0].startswith(words)


class CrossingTwice(Crossing):
    """One layer that attends to two sequences, one after the other."""

    def forward(self, x, memory, values):
        x = self.attention(self.act(self.first(x)), memory, memory)[0]
        return self.last(self.attention(x, values, values)[0])


def test_a_layer_that_is_called_twice_is_exact():
    inputs = (InputInfo("x", SHAPE), InputInfo("memory", (4, 8)), InputInfo("values", (3, 8)))
    assert_exact(prepared(CrossingTwice()), inputs, WIDTHS)


@pytest.mark.parametrize("name", ["attention.in_proj_weight", "attention.out_proj.weight"])
def test_one_code_that_differs_is_found_in_its_place(name):
    model = TruncModel(prepared(Attending()), CheckpointInfo("test", {}, SHAPE, WIDTHS))
    ((_, content),) = export_onnx(model, (4,))
    file = onnx.load_from_string(content)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == f"{name}.codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[5, 3] ^= 0x80
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    layer = name.removesuffix(".weight")
    for verdict in verdicts(model, file.SerializeToString(), 4):
        assert verdict.problems[0].startswith(f"layer {layer}: 1 of {codes.size} codes differ, first at (5, 3)")


def test_a_bias_that_differs_is_found():
    model = TruncModel(prepared(Attending()), CheckpointInfo("test", {}, SHAPE, WIDTHS))
    ((_, content),) = export_onnx(model, (4,))
    file = onnx.load_from_string(content)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "attention.in_proj_bias")
    values = numpy_helper.to_array(tensor).copy()
    values[17] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for verdict in verdicts(model, file.SerializeToString(), 4):
        assert not verdict.passed
        assert "attention" in verdict.problems[0]


def test_an_encoder_layer_trains_and_stays_equal_without_gradients():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    network = prepare(nn.Sequential(nn.Linear(6, 8), encoder, nn.Linear(8, 3)), WIDTHS)
    assert "1.self_attn.in_proj_weight" in quantized_weights(network)
    x = torch.rand(2, 5, 6)
    network(x).square().sum().backward()
    weights = quantized_weights(network).values()
    assert all(float(weight.original.grad.abs().sum()) > 0 for weight in weights)
    expected = network.eval()(x)
    with torch.no_grad():
        assert torch.allclose(network(x), expected, atol=1e-5)


class Steps(nn.Module):
    """A transformer layer as PyTorch has it by default: the steps of a sequence first, then the samples."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 8), nn.ReLU()
        self.encoder, self.act2, self.last = nn.TransformerEncoderLayer(8, 2, 12), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.act(self.first(x.transpose(0, 1)))
        return self.last(self.act2(self.encoder(x)).transpose(0, 1))


def test_it_is_exact_in_both_formats_at_every_width():
    network = prepared(Steps())
    assert len(quantized_weights(network)) == 4
    assert_exact(network, SHAPE, WIDTHS)
