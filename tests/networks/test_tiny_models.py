"""The MLPerf Tiny networks, and the operators that stand between layers elsewhere."""

from __future__ import annotations

import pytest
import torch
from networks import assert_parity, convert, model_of, randomize_
from torch import nn

from tqexport import prepare
from tqexport.networks.tiny_models import autoencoder, ds_cnn, mobilenet, resnet8
from tqexport.training.quantizers import quantized_weights

# Published input shapes, and the sizes of the published int8 files.
TINY = {
    resnet8: ((3, 32, 32), 10, 98_496),
    mobilenet: ((3, 96, 96), 2, 333_288),
    ds_cnn: ((1, 49, 10), 12, 53_936),
    autoencoder: ((640,), 640, 276_976),
}


@pytest.mark.parametrize("factory", TINY, ids=lambda factory: factory.__name__)
def test_mlperf_tiny_networks(factory):
    shape, outputs, published = TINY[factory]
    network = randomize_(factory(widths=(1, 8), quantize_all=True), 0)
    with torch.no_grad():
        assert network(torch.rand(2, *shape)).shape == (2, outputs)
    model = model_of(network, shape, (1, 8))
    files = convert(model)
    assert_parity(model, files, samples=2)
    codes = sum(weight.original.numel() for weight in quantized_weights(network).values())
    for bits, content in files.items():
        assert codes < len(content) < 1.1 * published, bits


def test_first_and_last_layer_stay_float_unless_asked():
    assert set(quantized_weights(ds_cnn(quantize_all=True))) - set(quantized_weights(ds_cnn())) == {
        "0.0.weight",
        "5.2.weight",
    }


class Between(nn.Module):
    """Non-square everything: pooling, concatenation, residual add, and the usual activation functions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, (3, 5))
        self.a, self.b = nn.Conv2d(6, 4, (1, 3), padding=(0, 1)), nn.Conv2d(6, 5, 3, padding=1, stride=(2, 1))
        self.c = nn.Conv2d(10, 10, (3, 1), padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.act = nn.ReLU()
        self.last = nn.Linear(10, 3)

    def forward(self, x):
        x = self.act(self.first(x))
        a = nn.functional.max_pool2d(nn.functional.relu6(self.a(x)), (2, 1), ceil_mode=True)
        x = torch.cat([nn.functional.hardswish(a), torch.sigmoid(self.b(x)), x[:, :1, ::2]], dim=1)
        x = self.act(self.norm(self.c(x)) + x)
        return self.last(nn.functional.avg_pool2d(x, (2, 3)).mean((2, 3)))


def test_operators_between_layers():
    network = randomize_(prepare(Between(), (1, 4, 8)), 2)
    model = model_of(network, (2, 13, 16))
    assert_parity(model, convert(model))
