"""Layers that have weight norm or spectral norm already, and networks that other tools wrapped."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from exactness import verdicts
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from tqexport import CheckpointInfo, TruncModel, load_checkpoint, prepare, save_checkpoint
from tqexport.backends.onnx.export import export_onnx
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import ConversionError, UsageError
from tqexport.integer.calibration import calibrate
from tqexport.training.quantizers import quantized_weights, unwrapped

WIDTHS = (1, 8)
SHAPE = (3, 7, 6)


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(
        *(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
        *(parametrizations.weight_norm(nn.Conv2d(4, 5, 3)), nn.ReLU()),
        *(parametrizations.spectral_norm(nn.Conv2d(5, 5, 1)), nn.ReLU()),
        *(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(30, 2))),
    )


def test_what_is_quantised_becomes_a_parameter_in_a_sentence(caplog):
    network = normalised().eval()
    before = copy.deepcopy(network.state_dict())
    expected = network[2].weight.detach().clone()
    prepared = prepare(network, WIDTHS)
    weights = quantized_weights(prepared)
    assert list(weights) == ["2.weight", "4.weight"]
    assert torch.equal(weights["2.weight"].original, expected)
    assert "layer 2: its weight was computed by WeightNorm" in caplog.text
    assert "layer 4: its weight was computed by SpectralNorm" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network[2].weight, expected)  # the network given is as it was


def test_files_hold_what_is_computed():
    network = prepare(normalised(), WIDTHS).eval()
    model = TruncModel(network, CheckpointInfo("test", {}, SHAPE, WIDTHS))
    for bits, content in export_onnx(model, WIDTHS):
        graph = onnx.load_from_string(content).graph
        assert {"0.weight", "7.weight"} <= {tensor.name for tensor in graph.initializer}
        assert {node.op_type for node in graph.node} & {"ReduceL2", "Sqrt", "ReduceSum", "Pow"} == set()
        for verdict in verdicts(model, content, bits):
            assert verdict.passed, verdict.problems
    assert parametrize.is_parametrized(network[0])  # as it was


def test_float_layers_keep_it_in_training():
    prepared = prepare(normalised(), WIDTHS)
    prepared(torch.rand(2, *SHAPE)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [weight_norm, lambda layer: prune.random_unstructured(layer, "weight", 0.5)])
def test_weights_that_a_hook_computes_are_refused_by_name(change):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    change(network[2])
    with pytest.raises(UsageError, match="weight of layer 2 is no parameter but computed before every call"):
        prepare(network, WIDTHS)


def test_calibration_refuses_it_by_name():
    model = TruncModel(prepare(normalised(), WIDTHS).eval(), CheckpointInfo("test", {}, SHAPE, WIDTHS))
    with pytest.raises(ConversionError, match="the weight of layer 0 is no parameter of its own"):
        calibrate(model, np.random.default_rng(0).random((16, *SHAPE), np.float32))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch.compile imports what warns so
@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda network: torch.compile(nn.DataParallel(network))]
)
def test_wrapped_networks_are_taken_out(wrap, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plain_net", SimpleNamespace(build=lambda: prepare(plain(), WIDTHS)))
    network = wrap(plain())
    assert type(unwrapped(network)) is nn.Sequential
    prepared = prepare(network, WIDTHS)
    assert list(quantized_weights(prepared)) == ["2.weight"]
    save_checkpoint(tmp_path / "net.pt", wrap(prepared), CheckpointInfo("plain_net:build", {}, (4,), WIDTHS))
    model = load_checkpoint(tmp_path / "net.pt", ReadOptions(model="plain_net:build"))
    assert list(quantized_weights(model.module)) == ["2.weight"]


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
