"""Conv3d: the window comes first among the axes of TFLite's filter, and BatchNorm3d is one per width."""

from __future__ import annotations

import pytest
from exactness import assert_exact, verdicts
from networks import randomize_
from torch import nn

from tqexport import CheckpointInfo, SwitchableBatchNorm3d, TruncModel, prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.training.quantizers import quantized_weights

WIDTHS = (1, 4, 8)
SHAPE = (2, 5, 6, 7)


def video(**geometry):
    layers = (
        *(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv3d(4, 6, **geometry), nn.BatchNorm3d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3)),
    )
    network = randomize_(prepare(nn.Sequential(*layers), WIDTHS), 5)
    assert list(quantized_weights(network)) == ["2.weight"]
    assert isinstance(network[3], SwitchableBatchNorm3d)
    return network


def test_it_is_exact_in_both_formats_at_every_width():
    assert_exact(video(kernel_size=(3, 2, 3), stride=(1, 2, 1), padding=1, bias=False), SHAPE, WIDTHS)


@pytest.mark.parametrize("geometry", [{"kernel_size": 3, "groups": 2}, {"kernel_size": 2, "dilation": 2}], ids=str)
def test_every_geometry_is_exact_in_onnx(geometry):
    model = TruncModel(video(**geometry), CheckpointInfo("test", {}, SHAPE, WIDTHS))
    for bits, content in export_onnx(model, WIDTHS):
        for verdict in verdicts(model, content, bits):
            assert verdict.passed, verdict.problems
