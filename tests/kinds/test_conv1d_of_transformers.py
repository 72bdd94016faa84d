"""The linear layer of GPT-2, which has its weight turned."""

from __future__ import annotations

import copy

import torch
from networks import assert_parity, convert, model_of, randomize_
from torch import nn

from tqexport import prepare
from tqexport.backends.onnx.export import export_onnx

WIDTHS = (1, 4, 8)


class Conv1D(nn.Module):
    """As the class in transformers computes, which the tests do not need."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 3), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).reshape(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


def network():
    shared = Conv1D(8, 8)
    return nn.Sequential(nn.Linear(6, 8), Conv1D(12, 8), nn.ReLU(), Conv1D(8, 12), shared, shared, nn.Linear(8, 3))


def test_it_becomes_a_linear_layer_that_computes_the_same(caplog):
    original = network().eval()
    original[3].bias.requires_grad_(False)
    before = copy.deepcopy(original.state_dict())
    prepared = prepare(original, WIDTHS, float_layers=["0", "1", "3", "6"], quantize_activations=False)
    assert "layer 1: it is a Conv1D of transformers" in caplog.text
    assert [type(prepared[i]) for i in (1, 3)] == [nn.Linear, nn.Linear]
    assert prepared[4] is prepared[5]
    assert not prepared[1].training
    assert prepared[3].weight.requires_grad
    assert not prepared[3].bias.requires_grad
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(prepared[1:4](x), original[1:4](x))
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_a_conv1d_alone_is_one_too():
    assert isinstance(prepare(nn.Sequential(Conv1D(3, 4)), float_layers=[]).get_submodule("0"), nn.Linear)


def test_it_is_quantised_and_exact_in_both_formats():
    model = model_of(randomize_(prepare(network(), WIDTHS), 5), (5, 6), WIDTHS)
    (onnx_verdict, *_) = assert_parity(model, dict(export_onnx(model, WIDTHS)))
    assert onnx_verdict.codes == 96 + 96 + 2 * 64  # the shared one is written out for each call
    assert_parity(model, convert(model))
