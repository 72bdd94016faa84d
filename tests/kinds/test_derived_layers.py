"""Layers of somebody's own, derived from those of torch.nn, as timm and transformers have them."""

from __future__ import annotations

import pytest
from networks import assert_parity, convert, model_of, randomize_
from torch import nn
from torch.nn import functional

from tqexport import prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.errors import ConversionError
from tqexport.training.quantizers import quantized_weights

WIDTHS = (1, 4, 8)


class PaddedConv(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x):
        return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class StandardisedConv(nn.Conv2d):
    """Its filters have mean 0 and deviation 1 whatever its weight is."""

    def forward(self, x):
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias, self.stride, self.padding)


class NormAndActivation(nn.BatchNorm2d):
    """A BatchNorm with an activation of its own, which computes what it gives."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class TurnedLinear(nn.Linear):
    """Calls no function of torch.nn."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def picture_network(conv):
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), NormAndActivation(4), conv, NormAndActivation(6), nn.Flatten()),
        *(TurnedLinear(6 * 16, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


def prepared(conv, **options):
    return model_of(randomize_(prepare(picture_network(conv), WIDTHS, **options), 5), (2, 6, 6), WIDTHS)


def test_they_are_quantised_and_exact_in_both_formats():
    model = prepared(PaddedConv(4, 6, 2))
    assert list(quantized_weights(model.module)) == ["2.weight", "5.weight"]
    assert_parity(model, dict(export_onnx(model, WIDTHS)))
    assert_parity(model, convert(model))


def test_a_weight_that_another_is_computed_from():
    model = prepared(StandardisedConv(4, 6, 3, padding=1))
    assert_parity(model, dict(export_onnx(model, WIDTHS)))
    with pytest.raises(ConversionError, match="layer 2 computes another weight from its own, by ReduceMean"):
        convert(model)
    in_float = prepared(StandardisedConv(4, 6, 3, padding=1), float_layers=["0", "2", "7"])
    assert_parity(in_float, convert(in_float))


class Tokens(nn.Module):
    """A table that is scaled, and a recurrent layer with a forward of its own, which stays in float."""

    class Scaled(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 8

    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    def __init__(self):
        super().__init__()
        self.table, self.steps = self.Scaled(9, 4), self.Last(4, 5)
        self.mix, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.mix(self.steps(self.table(x))).relu())


def test_a_derived_embedding_is_quantised_and_a_derived_recurrent_layer_is_not():
    network = prepare(Tokens(), WIDTHS, float_layers=["head"])
    assert list(quantized_weights(network)) == ["table.weight", "mix.weight"]
