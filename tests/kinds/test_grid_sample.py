"""Values at the places of a grid that the network computes from its sample, as a spatial transformer does."""

from __future__ import annotations

import onnx
import pytest
import torch
from exactness import assert_exact
from networks import assert_parity, model_of
from torch import nn
from torch.nn import functional

from tqexport import prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.errors import ConversionError

WIDTHS = (1, 8)


class SpatialTransformer(nn.Module):
    def __init__(self, size, **options):
        super().__init__()
        self.size, self.options = size, options
        self.first, self.act, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Linear(6, 4)
        self.turned, self.turn, self.middle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        x = self.act(self.first(x))
        turn = self.turn(self.act(self.turned(x.mean((2, 3))))).reshape(-1, 2, 3) + torch.eye(2, 3)
        ends = self.options.get("align_corners", False)
        grid = functional.affine_grid(turn, [x.shape[0], 6, *self.size], align_corners=ends)
        x = functional.grid_sample(x, grid, **{"align_corners": False, **self.options})
        return self.last(self.act(self.middle(x)).mean((2, 3)))


def network(size, **options):
    torch.manual_seed(0)
    return prepare(SpatialTransformer(size, **options), WIDTHS)


def test_a_computed_grid_is_exact():
    assert_exact(network((5, 9)), (3, 8, 7), WIDTHS)


def test_each_sample_of_a_batch_has_its_own_grid():
    model = model_of(network((6, 6), padding_mode="border", align_corners=True).eval(), (3, 6, 6), WIDTHS)
    files = dict(export_onnx(model, WIDTHS))
    assert_parity(model, files)
    converted = convert_to_tflite([*map(onnx.load_from_string, files.values())], batch=2)
    assert_parity(model, dict(zip(WIDTHS, converted, strict=True)))


@pytest.mark.parametrize("options", [{"padding_mode": "reflection"}, {"mode": "nearest"}, {"mode": "bicubic"}])
def test_other_kinds_are_refused_by_name(options):
    model = model_of(network((5, 9), **options).eval(), (3, 8, 7), WIDTHS)
    models = [onnx.load_from_string(content) for _, content in export_onnx(model, [8])]
    with pytest.raises(ConversionError, match=r"operators that TFLite does not: GridSample \(GridSample\)"):
        convert_to_tflite(models)
