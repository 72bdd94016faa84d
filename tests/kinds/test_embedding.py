"""Embedding: a table whose rows are looked up, with its codes as the operator's first input in both formats."""

from __future__ import annotations

import onnx
import pytest
import torch
from exactness import assert_exact, verdicts
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, InputInfo, Scheme, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import UsageError
from tqexport.training.quantizers import quantized_weights

WIDTHS = (1, 4, 8)
INPUTS = (InputInfo("tokens", (7,), "int64", below=50),)


class Text(nn.Module):
    """Words, by two tables or by one and their places, averaged."""

    def __init__(self, *, places=False):
        super().__init__()
        self.words, self.others, self.by_place = nn.Embedding(50, 12), nn.Embedding(50, 12), places
        self.hidden, self.act, self.last = nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)

    def forward(self, tokens):
        x = self.words(tokens) + self.others(torch.arange(7) if self.by_place else tokens)
        return self.last(self.act(self.hidden(x)).mean(1))


def text(scheme=Scheme(), *, places=False, **options):
    torch.manual_seed(6)
    return prepare(Text(places=places), WIDTHS, scheme=scheme, **{"float_layers": ["last"], **options}).eval()


def as_model(network, scheme=Scheme()):
    return TruncModel(network, CheckpointInfo("test", {}, INPUTS, WIDTHS, scheme))


def test_it_is_exact_in_both_formats_at_every_width():
    network = text()
    assert list(quantized_weights(network)) == ["words.weight", "others.weight", "hidden.weight"]
    assert_exact(network, INPUTS, WIDTHS)


def test_the_first_layer_stays_in_float_where_nobody_says_otherwise():
    assert list(quantized_weights(text(float_layers=None))) == ["others.weight", "hidden.weight"]


def test_one_code_that_differs_is_found_in_its_place():
    model = as_model(text())
    ((_, content),) = export_onnx(model, (4,))
    file = onnx.load_from_string(content)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "words.weight.codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[31, 5] ^= 0x80
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    for verdict in verdicts(model, file.SerializeToString(), 4):
        assert verdict.problems[0].startswith("layer words: 1 of 600 codes differ, first at (31, 5)")


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(bias_correction=True)], ids=["plain", "bias correction"])
def test_a_tflite_file_has_a_byte_for_each_weight_and_what_differs_is_found(scheme):
    model = as_model(text(scheme), scheme)
    widths = (4, 8)
    models = [onnx.load_from_string(content) for _, content in export_onnx(model, widths)]
    for bits, content in zip(widths, convert_to_tflite(models), strict=True):
        assert all(verdict.passed for verdict in verdicts(model, content, bits))
        flat = FlatModel(content)
        index = flat.find("words.weight.codes")
        integers = flat.constant(index).copy()
        assert (integers.dtype, integers.shape) == ("int8", (50, 12))
        integers[31, 5] ^= 2
        flat.set_constant(index, integers)
        for verdict in verdicts(model, flat.pack(), bits):
            assert "layer words: 1 of 600 codes differ, first at (31, 5)" in verdict.problems[0]


def test_a_table_that_is_the_last_layer_too_is_exact():
    torch.manual_seed(6)
    network = Text()
    network.last, network.hidden = nn.Linear(12, 50, bias=False), nn.Linear(12, 12)
    network.last.weight = network.words.weight
    model = as_model(prepare(network, WIDTHS, float_layers=["hidden"]).eval())
    assert {"words.weight", "last.weight"} <= {*quantized_weights(model.module)}
    for bits, content in export_onnx(model, WIDTHS):
        for verdict in verdicts(model, content, bits):
            assert verdict.passed, verdict.problems


def test_places_that_are_the_same_for_every_sample_have_their_codes_in_every_file():
    network = text(places=True)
    assert_exact(network, INPUTS, WIDTHS)
    model = as_model(network)
    ((_, content),) = export_onnx(model, (4,))
    flat = FlatModel(*convert_to_tflite([onnx.load_from_string(content)]))
    codes = flat.find("others.weight.codes")
    changed = flat.constant(codes).copy()
    changed[2, 3] ^= 2
    flat.set_constant(codes, changed)
    for verdict in verdicts(model, flat.pack(), 4):
        assert verdict.problems[0].startswith("layer others: 1 of 600 codes differ, first at (2, 3)")


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}])
def test_what_a_quantised_table_cannot_have_is_refused_by_name(option):
    network = nn.Sequential(nn.Embedding(5, 4, **option), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=f"0 is an Embedding with {next(iter(option))}"):
        prepare(network, WIDTHS, float_layers=["1"])


def test_a_network_that_computes_with_it_trains():
    network = text().train()
    network(torch.tensor([[0, 1, 2, 3, 4, 5, 6]])).square().sum().backward()
    gradient = quantized_weights(network)["words.weight"].original.grad
    assert gradient.shape == (50, 12)
    assert float(gradient.abs().sum()) > 0
