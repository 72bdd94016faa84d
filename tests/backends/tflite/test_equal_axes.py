"""Networks whose axes have the same size: nothing but what they compute tells one from another."""

from __future__ import annotations

import pytest
import torch
from networks import assert_parity, convert, model_of
from torch import nn
from torch.nn import functional

from tqexport import prepare

SIZE = 6


class Cube(nn.Module):
    """Channels, rows and columns in one number, with an operator between two convolutions."""

    def __init__(self, operator):
        super().__init__()
        self.first, self.second = nn.Conv2d(SIZE, SIZE, 3, padding=1), nn.Conv2d(SIZE, SIZE, 3, padding=1)
        self.act, self.act2, self.last = nn.ReLU(), nn.ReLU(), nn.Linear(SIZE, 4)
        self.operator = operator

    def forward(self, x):
        return self.last(self.act2(self.second(self.operator(self.act(self.first(x))))).mean((2, 3)))


FILTER = torch.linspace(-1, 1, SIZE * SIZE * 9).reshape(SIZE, SIZE, 3, 3)


def in_order(x):
    """A value that has ONNX's order of axes in a TFLite file, too."""
    return x.flatten(2).softmax(2).reshape(x.shape)


OPERATORS = {
    "convolution with a stride": lambda x: functional.conv2d(in_order(x), FILTER, None, 2, 1),
    "transposed convolution": lambda x: functional.conv_transpose2d(in_order(x), FILTER, None, 2, 1),
    "average pooling": lambda x: functional.avg_pool2d(in_order(x), 3, 1, 1, count_include_pad=False),
    "largest in a window": lambda x: functional.max_pool2d(in_order(x), 2),
    "twice the size": lambda x: functional.interpolate(in_order(x), scale_factor=2),
    "rows and columns exchanged": lambda x: x.transpose(2, 3),
    "channels and rows exchanged": lambda x: x.transpose(1, 2),
    "all exchanged": lambda x: x.permute(0, 2, 3, 1),
    "channel shuffle": lambda x: x.reshape(-1, 2, 3, SIZE, SIZE).transpose(1, 2).reshape(-1, SIZE, SIZE, SIZE),
    "softmax over rows": lambda x: x.softmax(2),
    "softmax over columns": lambda x: x.softmax(3),
    "layer norm over columns": lambda x: functional.layer_norm(x, (SIZE,)),
    "product with itself turned": lambda x: x @ x.transpose(2, 3),
    "einsum": lambda x: torch.einsum("nchw,nchv->ncwv", x, x),
    "places as channels": lambda x: x.flatten(2).transpose(1, 2).reshape(-1, SIZE, SIZE, SIZE),
    "largest of each row": lambda x: x - x.amax(2, keepdim=True),
    "halves exchanged": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_pictures(operator):
    model = model_of(prepare(Cube(operator), (2, 8)), (SIZE, SIZE, SIZE), (2, 8))
    assert_parity(model, convert(model))


def test_many_channels_between():
    """Large filters have one number all over during the conversion, and must not carry every activation beyond one."""
    network = Cube(nn.Conv2d(SIZE, 512, 3, padding=1))
    network.second = nn.Conv2d(512, SIZE, 3, padding=1)
    model = model_of(prepare(network, (2, 8)), (SIZE, SIZE, SIZE), (2, 8))
    assert_parity(model, convert(model))


def test_as_many_samples_as_channels():
    def several(x):
        for name in ("all exchanged", "channel shuffle", "average pooling", "einsum"):
            x = OPERATORS[name](x)
        return x

    model = model_of(prepare(Cube(several), (2, 8)), (SIZE, SIZE, SIZE), (2, 8))
    assert_parity(model, convert(model, SIZE))


class Sequence(nn.Module):
    """As many steps as there are channels, with a layer between two linear ones."""

    def __init__(self, layer, channels=SIZE):
        super().__init__()
        self.first, self.layer = nn.Linear(SIZE, channels), layer
        self.second, self.last, self.act = nn.Linear(channels, SIZE), nn.Linear(SIZE, 4), nn.ReLU()

    def forward(self, x):
        value = self.layer(self.first(x))
        return self.last(self.act(self.second(value[0] if isinstance(value, tuple) else value)).mean(1))


class FirstStep(nn.LayerNorm):
    """What classifiers of text look at."""

    def forward(self, x):
        return super().forward(x)[:, :1]


class OneHead(nn.Module):
    """Keys of one head, as many steps as numbers, which are scaled and turned as in language models."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, SIZE + 1))

    def forward(self, x):
        key = x.reshape(-1, SIZE, 1, SIZE)
        key = (self.weight * (key * (key.square().mean(-1, keepdim=True) + 1e-3).rsqrt())).transpose(1, 2)
        turned = torch.cat([-key[..., SIZE // 2 :], key[..., : SIZE // 2]], -1)
        return (key + turned * torch.linspace(-1, 1, SIZE * SIZE).reshape(SIZE, SIZE))[:, 0]


LAYERS = {
    "one head": OneHead,
    "first step": lambda: FirstStep(SIZE),
    "transformer": lambda: nn.TransformerEncoderLayer(SIZE, 2, 8, batch_first=True, norm_first=True),
    "lstm": lambda: nn.LSTM(SIZE, SIZE, batch_first=True),
    "gru": lambda: nn.GRU(SIZE, SIZE, batch_first=True),
}


@pytest.mark.parametrize("batch", [1, SIZE])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_sequences(layer, batch):
    model = model_of(prepare(Sequence(layer()), (2, 8)), (SIZE, SIZE), (2, 8))
    assert_parity(model, convert(model, batch))


def test_small_values():
    """The converter takes the first order of axes whose error is below 0.001: here every order has such an error."""
    layer = nn.TransformerEncoderLayer(2 * SIZE, 2, 8, batch_first=True, norm_first=True)
    network = Sequence(layer, 2 * SIZE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 0.02
    model = model_of(prepare(network, (2, 8)), (SIZE, SIZE), (2, 8))
    assert_parity(model, convert(model))
