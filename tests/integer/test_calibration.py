"""Calibration gives a network grids that PyTorch rounds to, that a checkpoint keeps, and that cost next to nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import randomize_
from torch import nn

from tqexport import CheckpointInfo, TruncModel, load_checkpoint, prepare, save_checkpoint
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.grids import grid_of_range, grids_of


def logits(model, bits, inputs):
    with torch.no_grad(), model.at_width(bits) as network:
        return network(torch.from_numpy(inputs)).numpy()


def test_values_without_an_activation_quantiser_get_grids(calibrated):
    assert calibrated.info.grids == (
        "input",
        "layers.0.bn1",  # the first shortcut is an activation already
        "layers.1.bn1",
        "layers.1.shortcut.1",
        "layers.2.bn1",
        "layers.2.shortcut.1",
        "mean",
        "fc",
    )


@pytest.mark.parametrize("estimator", ["min-max", "percentile", "mse"])
def test_grids_cost_at_most_a_point_of_accuracy(digits, digits_samples, estimator):
    calibrated = calibrate(digits, digits_samples.inputs[:200], estimator)
    inputs, labels = digits_samples.inputs[200:], digits_samples.labels[200:]
    for bits in (2, 4, 8):
        before, after = (
            float((logits(model, bits, inputs).argmax(1) == labels).mean()) for model in (digits, calibrated)
        )
        assert after >= before - 0.01


def test_the_network_given_is_not_changed(digits, held_out):
    before = logits(digits, 4, held_out[:32])
    calibrate(digits, held_out)
    assert np.array_equal(logits(digits, 4, held_out[:32]), before)
    assert grids_of(digits.module) is None


def test_a_checkpoint_keeps_the_grids(calibrated, held_out, tmp_path):
    save_checkpoint(tmp_path / "ckpt-int.pt", calibrated.module, calibrated.info)
    loaded = load_checkpoint(tmp_path / "ckpt-int.pt")
    assert loaded.info.grids == calibrated.info.grids
    for bits in (1, 4, 8):
        assert np.array_equal(logits(loaded, bits, held_out), logits(calibrated, bits, held_out))


def test_calibrating_again_finds_the_same_grids(calibrated, digits_samples):
    again = calibrate(calibrated, digits_samples.inputs[:200])
    # Biases have moved by less than a level, so the ranges may have moved a little.
    first, second = (grids_of(model.module).at(4) for model in (calibrated, again))
    assert first.keys() == second.keys()
    assert all(second[name].scale == pytest.approx(first[name].scale, rel=0.02) for name in first)


def test_the_float_kernel_exports_the_grids_too(calibrated, held_out):
    ((_, content),) = export_onnx(calibrated, (2,))
    assert np.allclose(run_file(content, held_out[:50]).output, logits(calibrated, 2, held_out[:50]), atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pytorch_runs_the_integer_network(calibrated, held_out, bits):
    network = integer_model(calibrated, bits)
    grid = network.grids[network.output]
    found = np.rint(logits(calibrated, bits, held_out) / np.float32(grid.scale)) + grid.zero_point
    expected = network.run(held_out)[network.output].astype(int)
    assert np.abs(found - expected).max() <= 2  # flips where floats are added in another order
    assert (found != expected).mean() < 0.05


def test_gradients_pass_through_the_grids(calibrated, held_out):
    inputs = torch.from_numpy(held_out[:4]).requires_grad_()
    with calibrated.at_width(4) as network:
        network(inputs).sum().backward()
    assert inputs.grad is not None
    assert bool(inputs.grad.any())


def test_a_forward_that_fails_leaves_the_network_usable(calibrated, held_out):
    with pytest.raises(RuntimeError), calibrated.at_width(4) as network:
        network(torch.zeros(1, 3, 8, 8))
    assert logits(calibrated, 4, held_out[:2]).shape == (2, 10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, :, :4], "the network takes"),
        (lambda x: x.astype(np.float64), "the network takes"),
        (lambda x: x[:3], "3 samples are too few"),
        (lambda x: np.where(x > 1, np.nan, x).astype(np.float32), "NaN"),
        (lambda x: np.zeros_like(x), "channel 0 of the samples is the same number everywhere"),
    ],
)
def test_bad_samples_are_refused_in_a_sentence(digits, held_out, spoil, message):
    with pytest.raises(InputError, match=message):
        calibrate(digits, spoil(held_out))


def test_an_unknown_estimator_is_refused(digits, held_out):
    with pytest.raises(UsageError, match="min-max, percentile, mse"):
        calibrate(digits, held_out, "median")


def test_a_network_without_grids_names_the_first_value_that_lacks_one(digits):
    with pytest.raises(InputError, match=r"input has no grid.*tqexport calibrate"):
        integer_model(digits, 4)


def test_a_value_that_is_always_the_same_is_refused():
    network = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), (2, 4))
    randomize_(network, 0)
    with torch.no_grad():
        network[4].weight[:] = torch.eye(2, 8)
        network[2].bias[:] = -100  # no activation behind it ever fires
        network[4].bias[:] = 1
    model = TruncModel(network, CheckpointInfo("small", {}, (4,), (2, 4)))
    with pytest.raises(InputError, match="4 is 1 on all of these samples"):
        calibrate(model, np.random.default_rng(0).random((32, 4), np.float32))


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.third(self.second(self.first(x)).softmax(1))


def test_an_operation_without_integer_form_is_named():
    model = TruncModel(prepare(Softmax(), (2, 4)).eval(), CheckpointInfo("softmax", {}, (4,), (2, 4)))
    with pytest.raises(ConversionError, match="softmax"):
        calibrate(model, np.random.default_rng(0).random((32, 4), np.float32))


def test_zero_is_always_on_a_level():
    for low, high in ((-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5)):
        grid = grid_of_range(low, high)
        assert 0 <= grid.zero_point <= 255
        assert (255 - grid.zero_point) * grid.scale >= max(high, 0) - grid.scale


def test_calibration_computes_on_one_thread(digits, digits_samples, monkeypatch):
    """On two, sums have other last bits, and so have the grids."""
    seen, conv = set(), nn.Conv2d.forward

    def look(self, x):
        seen.add(torch.get_num_threads())
        return conv(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", look)
    torch.set_num_threads(2)
    try:
        calibrate(digits, digits_samples.inputs[:64])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == {1}
