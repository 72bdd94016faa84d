"""MultiheadAttention: one weight for queries, keys and values, or three; its out_proj is a layer that nobody calls."""

from __future__ import annotations

import onnx
import pytest
import torch
from exactness import assert_exact, verdicts
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, InputInfo, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.errors import ConversionError
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


def assert_exact_in_onnx(network, inputs):
    model = TruncModel(network, CheckpointInfo("test", {}, inputs, WIDTHS))
    for bits, content in export_onnx(model, WIDTHS):
        for verdict in verdicts(model, content, bits):
            assert verdict.passed, verdict.problems
    return content


def test_without_the_weights_of_attention_and_without_biases_it_is_exact():
    network = prepared(Attending(need_weights=False, bias=False))
    assert list(quantized_weights(network)) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert_exact_in_onnx(network, SHAPE)


def test_weights_of_other_sizes_are_exact():
    network = prepared(Crossing(kdim=7, vdim=6))
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    assert list(quantized_weights(network)) == [f"attention.{name}" for name in names]
    assert_exact_in_onnx(network, (InputInfo("x", SHAPE), InputInfo("memory", (4, 7)), InputInfo("values", (4, 6))))


def test_attention_to_another_sequence_is_exact_in_onnx_and_refused_by_name_in_tflite():
    inputs = (InputInfo("x", SHAPE), InputInfo("memory", (4, 8)), InputInfo("values", (4, 8)))
    content = assert_exact_in_onnx(prepared(Crossing()), inputs)
    with pytest.raises(ConversionError, match=r"layer attention\.in_proj_weight multiplies with parts of its weight"):
        convert_to_tflite([onnx.load_from_string(content)])


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
