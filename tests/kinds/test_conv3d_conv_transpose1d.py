"""Conv3d and ConvTranspose1d: other axes than the filters of TFLite have; one conversion tries both."""

from __future__ import annotations

import onnx
import pytest
from exactness import assert_exact, verdicts
from networks import randomize_
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, SwitchableBatchNorm3d, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.training.quantizers import quantized_weights

WIDTHS = (1, 4, 8)
SHAPE = (2, 5, 6, 7)


def video(*, transposed=(), **geometry):
    """A three-dimensional convolution, and behind it a transposed one over all of space as one axis."""
    layers = (
        *(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv3d(4, 6, **geometry), nn.BatchNorm3d(6), nn.ReLU(), nn.Flatten(2)),
        *(nn.ConvTranspose1d(6, 4, **{"kernel_size": 3, **dict(transposed)}), nn.BatchNorm1d(4), nn.ReLU()),
        nn.Conv1d(4, 2, 1),
    )
    network = randomize_(prepare(nn.Sequential(*layers), WIDTHS), 5)
    assert list(quantized_weights(network)) == ["2.weight", "6.weight"]
    assert isinstance(network[3], SwitchableBatchNorm3d)
    return network


def test_they_are_exact_in_both_formats_at_every_width():
    transposed = {"stride": 2, "padding": 1, "output_padding": 1}
    geometry = {"kernel_size": (3, 2, 3), "stride": (1, 2, 1), "padding": 1, "bias": False}
    assert_exact(video(transposed=transposed, **geometry), SHAPE, WIDTHS)


def as_model(network):
    return TruncModel(network, CheckpointInfo("test", {}, SHAPE, WIDTHS))


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "groups": 2, "transposed": {"bias": False}},
        {"kernel_size": 2, "dilation": 2, "transposed": {"groups": 2, "dilation": 2}},
    ],
    ids=["groups", "dilation"],
)
def test_other_geometries_are_exact_in_onnx(geometry):
    model = as_model(video(**geometry))
    for bits, content in export_onnx(model, WIDTHS):
        for verdict in verdicts(model, content, bits):
            assert verdict.passed, verdict.problems


def test_codes_that_differ_are_found_in_their_place():
    model = as_model(video(kernel_size=2))
    ((_, content),) = export_onnx(model, (4,))
    file = onnx.load_from_string(content)
    for name, place in (("2.weight", (5, 3, 1, 0, 1)), ("6.weight", (5, 3, 2))):
        tensor = next(tensor for tensor in file.graph.initializer if tensor.name == f"{name}.codes")
        codes = numpy_helper.to_array(tensor).copy()
        codes[place] ^= 0x80
        tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    for verdict in verdicts(model, file.SerializeToString(), 4):
        assert verdict.problems[0].startswith("layer 2: 1 of 192 codes differ, first at (5, 3, 1, 0, 1)")
        assert verdict.problems[1].startswith("layer 6: 1 of 72 codes differ, first at (5, 3, 2)")
