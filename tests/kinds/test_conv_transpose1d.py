"""ConvTranspose1d: TFLite has none; the converter takes the two-dimensional one with an axis of 1."""

from __future__ import annotations

import onnx
import pytest
from exactness import assert_exact, verdicts
from networks import randomize_
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.training.quantizers import quantized_weights

WIDTHS = (1, 4, 8)
SHAPE = (3, 9)


def upsampler(**geometry):
    layers = (
        *(nn.Conv1d(3, 6, 3, padding=1), nn.ReLU()),
        *(nn.ConvTranspose1d(6, 4, **geometry), nn.BatchNorm1d(4), nn.ReLU()),
        nn.Conv1d(4, 2, 1),
    )
    network = randomize_(prepare(nn.Sequential(*layers), WIDTHS), 3)
    assert list(quantized_weights(network)) == ["2.weight"]
    return network


def test_it_is_exact_in_both_formats_at_every_width():
    assert_exact(upsampler(kernel_size=3, stride=2, padding=1, output_padding=1), SHAPE, WIDTHS)


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_code_that_differs_is_found_in_its_place(bits):
    model = TruncModel(upsampler(kernel_size=3).eval(), CheckpointInfo("test", {}, SHAPE, WIDTHS))
    ((_, content),) = export_onnx(model, (bits,))
    file = onnx.load_from_string(content)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == "2.weight.codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[5, 3, 2] ^= 0x80
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    for verdict in verdicts(model, file.SerializeToString(), bits):
        assert verdict.problems[0].startswith("layer 2: 1 of 72 codes differ, first at (5, 3, 2)")
