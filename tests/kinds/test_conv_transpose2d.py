"""ConvTranspose2d: its codes count input channels first, and TFLite's operator has its data in third place."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from exactness import assert_exact, verdicts
from networks import randomize_
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import ConversionError
from tqexport.training.quantizers import quantized_weights

WIDTHS = (1, 4, 8)


class Decoder(nn.Module):
    """A transposed convolution between two others, with a BatchNorm behind it."""

    def __init__(self, **geometry):
        super().__init__()
        self.first, self.act0 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.up, self.norm, self.act1 = nn.ConvTranspose2d(6, 4, **geometry), nn.BatchNorm2d(4), nn.ReLU()
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.act1(self.norm(self.up(self.act0(self.first(x))))))


def decoder(**geometry):
    network = randomize_(prepare(Decoder(**geometry), WIDTHS), 3)
    assert list(quantized_weights(network)) == ["up.weight"]
    return network


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": (4, 2), "stride": (2, 1), "padding": (1, 0), "bias": False},
    ],
    ids=str,
)
def test_it_is_exact_in_both_formats_at_every_width(geometry):
    assert_exact(decoder(**geometry), (3, 7, 6), WIDTHS)


def as_model(network):
    return TruncModel(network.eval(), CheckpointInfo("test", {}, (3, 7, 6), WIDTHS))


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_code_that_differs_is_found_in_its_place(bits):
    model = as_model(decoder(kernel_size=3, stride=2))
    ((_, content),) = export_onnx(model, (bits,))
    file = onnx.load_from_string(content)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "up.weight.codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[5, 3, 2, 1] ^= 0x80
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    for verdict in verdicts(model, file.SerializeToString(), bits):
        assert verdict.problems[0].startswith("layer up: 1 of 216 codes differ, first at (5, 3, 2, 1)")


@pytest.mark.parametrize("bits", [4, 8])
def test_one_integer_that_differs_in_a_tflite_file_is_found(bits):
    model = as_model(decoder(kernel_size=3, stride=2))
    ((_, content),) = export_onnx(model, (bits,))
    flat = FlatModel(convert_to_tflite([onnx.load_from_string(content)])[0])
    index = flat.find("up.weight.codes")
    integers = flat.constant(index).copy()
    integers[1, 2, 0, 3] ^= 2
    flat.set_constant(index, integers)
    for verdict in verdicts(model, flat.pack(), bits):
        assert "layer up: 1 of 216 codes differ, first at (3, 1, 2, 0)" in verdict.problems[0]


def test_groups_are_exact_in_onnx_and_refused_by_name_in_tflite():
    model = as_model(decoder(kernel_size=3, groups=2))
    files = dict(export_onnx(model, WIDTHS))
    for bits, content in files.items():
        assert all(verdict.passed for verdict in verdicts(model, content, bits))
    with pytest.raises(ConversionError, match="layer up multiplies with parts of its weight, by ConvTranspose"):
        convert_to_tflite([onnx.load_from_string(files[4])])


def test_a_network_that_computes_with_it_trains():
    network = prepare(Decoder(kernel_size=2, stride=2), WIDTHS)
    x = torch.from_numpy(np.random.default_rng(0).random((2, 3, 7, 6), np.float32))
    network(x).square().sum().backward()
    gradient = quantized_weights(network)["up.weight"].original.grad
    assert gradient.shape == (6, 4, 2, 2)
    assert float(gradient.abs().sum()) > 0
