"""prepare(..., integer=True): a network trains as the integer network that its files are."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from torch import nn

from tqexport import (
    CheckpointInfo,
    ReadOptions,
    Scheme,
    at_width,
    joint_backward,
    load_checkpoint,
    load_float_weights,
    prepare,
    save_checkpoint,
)
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.integer.grids import grids_of
from tqexport.training.qat import calibrate_batch_norms

WIDTHS, EVERY_WIDTH, SHAPE = (1, 4, 8), (1, 2, 4, 8), (1, 8, 8)

NET = """
from torch import nn
from tqexport import prepare

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv, self.norm1, self.act1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.act1(x + self.norm1(self.conv(x)))
        return self.last(x.mean((2, 3)))

def build(widths):
    return prepare(Net(), widths, integer=True, input_shape=(1, 8, 8))
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The module that the user writes."""
    (tmp_path / "integer_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "integer_net", raising=False)
    import integer_net

    yield integer_net
    sys.modules.pop("integer_net", None)


def description(widths=WIDTHS):
    return CheckpointInfo("integer_net:build", {"widths": list(widths)}, SHAPE, tuple(widths))


def train(model, samples, steps=12):
    """A few steps on digits; returns the losses."""
    inputs, labels = torch.from_numpy(samples.inputs), torch.from_numpy(samples.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for batch in torch.arange(32 * steps).remainder(len(inputs)).split(32):
        optimizer.zero_grad()
        losses.append(joint_backward(model, inputs[batch], labels[batch], WIDTHS, nn.functional.cross_entropy))
        optimizer.step()
    return losses


def test_what_was_trained_in_integers_is_exported_and_verified_in_integers(net, digits_samples, tmp_path):
    model = net.build(WIDTHS)
    losses = train(model, digits_samples)
    assert losses[-1] < losses[0]
    save_checkpoint(tmp_path / "ckpt.pt", model, description())
    for arguments in (("onnx", "ckpt.pt", "--bits", "1,4,8"), ("tflite", "--bits", "1,4,8"), ("verify", "--json")):
        done = run(*arguments, "--model", "integer_net:build", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    results = {(result["runtime"], result["bits"]) for result in json.loads(done.stdout)["results"]}
    assert results >= {(f"{name} integer", bits) for name in ("onnxruntime", "LiteRT XNNPACK") for bits in WIDTHS}
    names = {path.name for path in (tmp_path / "tqexport-out").iterdir()}
    assert names >= {f"ckpt-w{bits}-integer.{kind}" for bits in WIDTHS for kind in ("onnx", "tflite")}


def test_the_checkpoint_is_what_trained_but_for_half_a_unit_of_a_bias(net, digits_samples, tmp_path):
    model = net.build(WIDTHS)
    train(model, digits_samples)
    save_checkpoint(tmp_path / "ckpt.pt", model, description())
    loaded = load_checkpoint(tmp_path / "ckpt.pt", ReadOptions(model="integer_net:build"))
    assert loaded.info.grids == grids_of(model).names == ("input", "norm1", "mean", "last")
    inputs = torch.from_numpy(digits_samples.inputs[:64])
    model.eval()
    for bits in WIDTHS:
        with torch.no_grad(), at_width(model, bits), loaded.at_width(bits) as network:
            before, after = model(inputs), network(inputs)
        assert (before - after).abs().max() <= 0.1 * before.abs().max()
    weight = loaded.module.last.weight.detach().double()
    steps = weight / weight.abs().amax(1, keepdim=True) * 127
    assert (steps - steps.round()).abs().max() < 1e-3
    save_checkpoint(tmp_path / "again.pt", loaded.module, loaded.info)
    again = load_checkpoint(tmp_path / "again.pt", ReadOptions(model="integer_net:build"))
    states = zip(loaded.module.state_dict().values(), again.module.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in states)


def test_grids_follow_in_training_mode_and_stand_still_in_evaluation(net, digits_samples):
    model = net.build(WIDTHS)
    inputs = torch.from_numpy(digits_samples.inputs[:64])
    grids = grids_of(model)
    model.train()
    with at_width(model, 4):
        model(inputs)
        first = grids.at(4)["input"]
        assert first.scale == pytest.approx(float((inputs.max() - inputs.min()) / 255))
        model(3 * inputs)
        assert grids.at(4)["input"].scale == pytest.approx(1.2 * first.scale)  # a tenth of the way to 3
        before = grids.scale.clone()
        model.eval()
        model(9 * inputs)
    assert torch.equal(grids.scale.nan_to_num(), before.nan_to_num())


def test_a_value_that_dies_keeps_its_grid(net):
    grids = grids_of(net.build(WIDTHS).train())
    grids.bits = 4
    assert grids.round("mean", torch.zeros(3)).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="no grid"):
        grids.at(4)
    grids.scale[1], grids.zero_point[1] = 1 / 255, 0
    for _ in range(1200):
        grids.round("mean", torch.zeros(3))
    assert grids.at(4)["mean"].scale == pytest.approx(1 / 255)
    grids.round("mean", torch.tensor([torch.inf, torch.nan]))
    assert grids.at(4)["mean"].scale == pytest.approx(1 / 255)


def test_symmetric_grids_stay_symmetric(symmetric, digits_samples):
    model = copy.deepcopy(symmetric.module)
    before = grids_of(model).scale.clone()
    train(model, digits_samples, 1)
    assert not torch.equal(grids_of(model).scale, before)
    assert bool((grids_of(model).zero_point == 128).all())


def test_float_layers_multiply_with_int8_while_they_train(net, digits_samples):
    model = net.build(WIDTHS).train()
    seen = []
    model.last.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight))
    with at_width(model, 8):
        model(torch.from_numpy(digits_samples.inputs[:8])).sum().backward()
    assert not torch.equal(seen[0], model.last.weight)
    assert (seen[0] - model.last.weight).abs().max() <= model.last.weight.abs().max() / 254 * 1.001
    assert isinstance(model.last.weight, nn.Parameter)  # again
    assert model.last.weight.grad is not None


def test_a_forward_that_fails_in_training_leaves_the_weights(net):
    model = net.build(WIDTHS).train()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, 8, 8))
    assert isinstance(model.last.weight, nn.Parameter)


def test_further_widths_get_grids_with_their_batch_norms(net, digits_samples, tmp_path):
    model = net.build(WIDTHS)
    train(model, digits_samples, 4)
    calibrate_batch_norms(model, torch.from_numpy(digits_samples.inputs[:96]).split(32), (2,))
    save_checkpoint(tmp_path / "ckpt.pt", model, description(EVERY_WIDTH))
    loaded = load_checkpoint(tmp_path / "ckpt.pt", ReadOptions(model="integer_net:build"))
    assert grids_of(loaded.module).widths == EVERY_WIDTH
    done = run("verify", "ckpt.pt", "--bits", "2", "--model", "integer_net:build", "--samples", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_trained_float_network_is_where_it_can_start(net):
    trained = net.Net()
    model = net.build(WIDTHS)
    assert not load_float_weights(model, trained.state_dict())
    assert torch.equal(model.first.weight, trained.first.weight)


def test_a_calibrated_network_trains_on_and_its_grids_follow(calibrated, digits_samples):
    model = copy.deepcopy(calibrated.module)
    before = grids_of(model).at(4)
    train(model, digits_samples, 2)
    after = grids_of(model).at(4)
    assert before != after
    assert all(0.5 < after[name].scale / before[name].scale < 2 for name in before)


class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x)).softmax(1))


LINEAR = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("network", "options", "error", "message"),
    [
        (LINEAR, {"integer": True}, UsageError, "integer=True needs input_shape"),
        (LINEAR, {"input_shape": (4,)}, UsageError, "input_shape is for integer=True alone"),
        (LINEAR, {"integer": True, "input_shape": (5,)}, ConversionError, r"does not run on a sample of shape \(5,\)"),
        (LINEAR, {"integer": True, "input_shape": (4,), "widths": (4, 32)}, UsageError, r"leave \[32\] out of widths"),
        (
            LINEAR,
            {"integer": True, "input_shape": (4,), "scheme": Scheme(bias_correction=True)},
            UsageError,
            "weights with bias correction have no integer form",
        ),
        (Softmax(), {"integer": True, "input_shape": (4,)}, ConversionError, "softmax"),
    ],
)
def test_what_cannot_be_an_integer_network_is_refused_when_it_is_prepared(network, options, error, message):
    with pytest.raises(error, match=message):
        prepare(network, **options)


def test_prepared_twice_is_refused(net):
    with pytest.raises(UsageError, match="has grids already"):
        prepare(net.build(WIDTHS), WIDTHS, float_layers=[], integer=True, input_shape=SHAPE)


def test_a_checkpoint_of_what_was_not_trained_or_of_other_widths_is_refused(net, digits_samples, tmp_path):
    path = tmp_path / "ckpt.pt"
    model = net.build(WIDTHS)
    with pytest.raises(InputError, match="input has no grid at 1 bits yet: the network was not trained"):
        save_checkpoint(path, model, description())
    with pytest.raises(InputError, match="input has no grid at 8 bits yet"), at_width(model.eval(), 8):
        model(torch.zeros(2, *SHAPE))
    train(model, digits_samples, 2)
    with pytest.raises(UsageError, match="has grids for 1, 4, 8 bits, the description says 1, 4;"):
        save_checkpoint(path, model, CheckpointInfo("integer_net:build", {"widths": [1, 4]}, SHAPE, (1, 4)))
    assert not Path(path).exists()


def test_a_factory_that_builds_other_grids_is_refused(net, digits_samples, tmp_path):
    model = net.build(WIDTHS)
    train(model, digits_samples, 2)
    info = CheckpointInfo("integer_net:build", {"widths": [1, 4]}, SHAPE, WIDTHS)
    save_checkpoint(tmp_path / "ckpt.pt", model, info)
    with pytest.raises(InputError, match=r"at 1, 4, 8 bits, and the network that .* builds has them for .* 1, 4 bits"):
        load_checkpoint(tmp_path / "ckpt.pt", ReadOptions(model="integer_net:build"))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_damaged_grids_are_refused_when_the_checkpoint_is_read(net, digits_samples, tmp_path, scale):
    model = net.build(WIDTHS)
    train(model, digits_samples, 2)
    save_checkpoint(tmp_path / "ckpt.pt", model, description())
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["state_dict"]["grids.scale"][1, 2] = scale
    torch.save(content, tmp_path / "ckpt.pt")
    done = run("inspect", "ckpt.pt", "--model", "integer_net:build", cwd=tmp_path)
    assert done.returncode == 3
    assert "ckpt.pt: mean" in done.stderr
