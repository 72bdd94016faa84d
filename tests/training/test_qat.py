"""Training: gradients, losses over several widths, float checkpoints, and options that must reach the files."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from commands import run
from networks import float_weight, randomize_
from onnx import numpy_helper
from torch import nn

from tqexport import (
    CheckpointInfo,
    Scheme,
    TruncLinear,
    TruncModel,
    at_width,
    calibrate_batch_norms,
    joint_backward,
    load_checkpoint,
    load_float_weights,
    prepare,
    save_checkpoint,
    set_quantizer,
)
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import InputError, UsageError
from tqexport.networks.tiny_models import resnet8
from tqexport.training.qat import soft_cross_entropy, truncation_alignment
from tqexport.training.quantizers import quantize_weight, quantized_weights
from tqexport.truncation import FLOAT_BITS, WIDTHS, full_precision, magnitude, max_code, normalize
from tqexport.verification.comparison import compare

SCHEMES = [Scheme(), Scheme("dorefa"), Scheme(power_of_two_scale=True)]
POWER_OF_TWO = Scheme(power_of_two_scale=True)


def float_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Linear(12, 3),
    )  # fmt: skip


def batch(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 6), torch.randint(0, 3, (count,))


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("estimator", ["identity", "scaled"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bits", [*WIDTHS, FLOAT_BITS])
def test_gradients_are_those_of_the_smooth_map_by_finite_differences(bits, scheme, estimator):
    weight = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(3, 4, dtype=torch.float64)
    (got,) = torch.autograd.grad(quantize_weight(weight, bits, scheme, estimator), weight, upstream)
    size = magnitude(weight, scheme)  # a constant of training

    def smooth(w):
        return (size * (2 * normalize(w) - 1) * upstream).sum()

    step = 1e-6
    expected = torch.zeros_like(weight)
    with torch.no_grad():
        for index in np.ndindex(*weight.shape):
            moved = torch.zeros_like(weight)
            moved[index] = step
            expected[index] = (smooth(weight + moved) - smooth(weight - moved)) / (2 * step)
    scaled = estimator == "scaled" and bits != FLOAT_BITS
    factor = max_code(bits) / (max_code(bits) + 1) if scaled else 1.0
    assert torch.allclose(got, factor * expected, atol=1e-7)


def test_an_unknown_estimator_or_quantizer_is_refused():
    with pytest.raises(UsageError, match="no estimator 'scale'; choose identity or scaled"):
        prepare(float_network(), estimator="scale")
    with pytest.raises(UsageError, match="no quantizer 'round'; choose truncquant or dorefa"):
        Scheme("round")
    with pytest.raises(UsageError, match="bias correction sets a scale of its own"):
        Scheme(bias_correction=True, power_of_two_scale=True)


def test_quantizer_and_estimator_of_a_network_already_built_can_be_chosen():
    network = resnet8(1, 3, 4)
    set_quantizer(network, Scheme("dorefa"), "scaled")
    assert {(weight.scheme, weight.quantizer.estimator) for weight in quantized_weights(network).values()} == {
        (Scheme("dorefa"), "scaled")
    }
    set_quantizer(network, estimator="identity")
    assert {weight.scheme for weight in quantized_weights(network).values()} == {Scheme("dorefa")}


def test_distillation_mixes_the_two_losses_and_leaves_the_teacher_alone():
    network = prepare(float_network(), (2, 8)).eval()
    x, y = batch()
    share = 0.3
    with at_width(network, 8):
        top = network(x)
    with at_width(network, 2):
        low = network(x)
    cross_entropy = nn.functional.cross_entropy
    soft = -(top.detach().softmax(1) * low.log_softmax(1)).sum(1).mean()
    expected = cross_entropy(top, y) + (1 - share) * cross_entropy(low, y) + share * soft
    expected.backward()
    expected, wanted = float(expected.detach()), gradients(network)
    network.zero_grad()
    got = joint_backward(network, x, y, (2, 8), cross_entropy, distillation=share)  # any order of the widths
    assert got == pytest.approx(expected / 2, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(network), wanted, strict=True))


def test_distillation_takes_a_loss_of_ones_own():
    network = prepare(float_network(), (2, 8)).eval()
    x, y = batch()
    with torch.no_grad():
        outputs = {}
        for bits in (2, 8):
            with at_width(network, bits):
                outputs[bits] = network(x)
    mse = nn.functional.mse_loss
    got = joint_backward(network, x, y, (8, 2), nn.functional.cross_entropy, distillation=1.0, distillation_loss=mse)
    expected = (nn.functional.cross_entropy(outputs[8], y) + mse(outputs[2], outputs[8])) / 2
    assert got == pytest.approx(float(expected), rel=1e-6)


def test_temperature_is_hintons():
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    expected = -4 * ((b / 2).softmax(1) * (a / 2).log_softmax(1)).sum(1).mean()
    assert torch.allclose(soft_cross_entropy(a, b, temperature=2), expected)


def test_joint_losses_go_through_the_loops_own_backward():
    network = prepare(float_network(), (2, 8))
    x, y = batch()
    joint_backward(network, x, y, (2, 8), nn.functional.cross_entropy, alignment=0.5)
    plain = gradients(network)
    network.zero_grad()
    seen = []

    def backward(value):
        seen.append(float(value.detach()))
        (1024 * value).backward()

    joint_backward(network, x, y, (2, 8), nn.functional.cross_entropy, alignment=0.5, backward=backward)
    assert len(seen) == 3
    assert seen[2] == pytest.approx(0.5 * float(truncation_alignment(network, (2, 8)).detach()))
    assert all(torch.allclose(a, 1024 * b, rtol=1e-4) for a, b in zip(gradients(network), plain, strict=True))


@pytest.mark.parametrize("options", [{"distillation": 1.5}, {"distillation": -0.1}, {"alignment": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match="must lie in"):
        joint_backward(prepare(float_network()), *batch(), (2, 8), nn.functional.cross_entropy, **options)
    with pytest.raises(UsageError, match="at least one width"):
        joint_backward(prepare(float_network()), *batch(), (), nn.functional.cross_entropy)


@pytest.mark.parametrize("estimator", ["identity", "scaled"])
@pytest.mark.parametrize("widths", [(2, 8), (1, 2, 4), (3, FLOAT_BITS)])
def test_alignment_reaches_the_weights_and_falls_when_followed(widths, estimator):
    network = prepare(float_network(), widths, estimator=estimator)
    (weight,) = quantized_weights(network).values()
    optimizer = torch.optim.SGD([weight.original], lr=0.5)
    before = truncation_alignment(network, widths)
    before.backward()
    assert int((weight.original.grad != 0).sum()) > weight.original.numel() // 2
    for _ in range(200):
        optimizer.zero_grad()
        truncation_alignment(network, widths).backward()
        optimizer.step()
    assert float(truncation_alignment(network, widths).detach()) < 0.5 * float(before.detach())


def test_alignment_is_the_distance_it_says():
    layer = TruncLinear(3, 1, bias=False)
    original = float_weight(layer)
    with torch.no_grad():
        original.copy_(torch.tensor([[1.0, -1.0, 0.0]]))
    weights = {}
    for bits in (1, 8):
        with at_width(layer, bits):
            weights[bits] = layer.weight.detach()
    size = float(original.detach().abs().mean())
    expected = float(((weights[8] - weights[1]) / size).square().mean())
    assert expected > 0.3
    assert float(truncation_alignment(layer, (8, 1)).detach()) == pytest.approx(expected)
    with torch.no_grad():
        original.mul_(1e-3)
        smaller = float(truncation_alignment(layer, (8, 1)))
        original.copy_(torch.tensor([[1.0, -1.0, 1.0]]))
    assert smaller == pytest.approx(expected, rel=0.05)  # whatever the size of the weights
    assert float(truncation_alignment(layer, (8, 1)).detach()) == pytest.approx(0, abs=1e-12)
    with pytest.raises(UsageError, match="8 bits is the only one"):
        truncation_alignment(layer, (8,))


def test_a_float_checkpoint_goes_into_a_prepared_network():
    trained = float_network()
    trained(batch()[0])  # moves the statistics of the BatchNorms
    network = prepare(float_network(), (2, 8))
    misfits = load_float_weights(network, {f"module.{key}": value for key, value in trained.state_dict().items()})
    assert not misfits
    assert str(misfits) == "everything fits"
    assert torch.equal(float_weight(network[3]), trained[3].weight)
    for bits in ("2", "8"):
        for key, value in trained[1].state_dict().items():
            assert torch.equal(network[1].bn_dict[bits].state_dict()[key], value), key


def test_what_does_not_fit_is_named_and_nothing_is_half_loaded():
    other = float_network()
    other[6] = nn.Linear(12, 5)
    state = other.state_dict()
    state["extra.weight"] = state.pop("3.bias")
    network = prepare(float_network(), (2, 8))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError, match=r"missing 3.bias; unexpected extra.weight; mismatched 6.weight, 6.bias; with"):
        load_float_weights(network, state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    misfits = load_float_weights(network, state, strict=False)
    assert (misfits.missing, misfits.unexpected) == (("3.bias",), ("extra.weight",))
    assert misfits.mismatched == ("6.weight", "6.bias")
    assert torch.equal(float_weight(network[3]), other[3].weight)
    assert torch.equal(network[6].weight, before["6.weight"])
    for nothing in ({}, {"conv.weight": torch.zeros(1)}):
        with pytest.raises(InputError, match=r"does not fit the network: missing 0\.weight"):
            load_float_weights(network, nothing, strict=False)


def test_calibration_leaves_modes_and_momentum_as_they_were():
    network = prepare(float_network(), (2, 8)).train()
    network[4].eval()  # frozen by its owner
    modes = {name: module.training for name, module in network.named_modules()}
    calibrate_batch_norms(network, [batch()[0]], [4, 5])
    assert {name: module.training for name, module in network.named_modules() if name in modes} == modes
    assert [network[i].bn_dict["4"].training for i in (1, 4)] == [True, False]
    assert network[1].bn_dict["4"].momentum == network[1].bn_dict["8"].momentum == 0.1
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UsageError, match="1 has a BatchNorm for 5 bits already"):
        calibrate_batch_norms(network, [batch()[0]], [3, 5])
    assert list(network.state_dict()) == list(before)


@pytest.mark.parametrize(("mean", "expected"), [(0.7, 0.5), (0.71, 1.0), (1.41, 1.0), (1.42, 2.0), (2**-20.4, 2**-20)])
def test_the_scale_becomes_the_nearest_power_of_two(mean, expected):
    weight = torch.full((8, 4), mean)
    weight[:, ::2] *= -1
    assert float(magnitude(weight, POWER_OF_TWO)) == expected
    assert float(full_precision(weight, POWER_OF_TWO).abs().max()) == expected
    for bits in WIDTHS:
        assert float(quantize_weight(weight, bits, POWER_OF_TWO).max()) == expected


@pytest.fixture(scope="module")
def power_of_two_folder(tmp_path_factory):
    """A checkpoint with power-of-two scales and its exports."""
    folder = tmp_path_factory.mktemp("power")
    network = randomize_(resnet8(1, 3, 4, widths=(1, 4, 8)), 0)
    set_quantizer(network, POWER_OF_TWO)
    arguments = {"in_channels": 1, "num_classes": 3, "width": 4, "widths": [1, 4, 8]}
    info = CheckpointInfo("resnet8", arguments, (1, 8, 8), (1, 4, 8), POWER_OF_TWO)
    save_checkpoint(folder / "ckpt.pt", network, info)
    for line in ("onnx ckpt.pt --bits all", "tflite --bits all", "onnx ckpt.pt --bits runtime"):
        result = run(*line.split(), cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


def test_power_of_two_scales_are_in_the_files_and_verified(power_of_two_folder):
    weights = quantized_weights(load_checkpoint(power_of_two_folder / "ckpt.pt").module)
    out = power_of_two_folder / "tqexport-out"
    assert json.loads((out / "tqexport.json").read_text())["power_of_two_scale"] is True
    for bits in (1, 4, 8):
        model = onnx.load(out / f"ckpt-w{bits}.onnx")
        assert {entry.key: entry.value for entry in model.metadata_props}["tqexport.power_of_two_scale"] == "true"
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for name, weight in weights.items():
            exponent = np.log2(-values[f"{name}.offset"])
            assert exponent == np.round(exponent)
            assert abs(exponent - np.log2(float(weight.original.detach().abs().mean()))) <= 0.5
            assert values[f"{name}.scale"] == np.float32(2.0 ** (exponent + 1) / max_code(bits))
        flat = FlatModel((out / f"ckpt-w{bits}.tflite").read_bytes())
        assert json.loads(flat.metadata("tqexport"))["power_of_two_scale"] is True
    verified = run("verify", "--json", cwd=power_of_two_folder)
    assert verified.returncode == 0, verified.stdout
    assert len(json.loads(verified.stdout)["results"]) == 9
    inspected = run("inspect", "ckpt.pt", cwd=power_of_two_folder).stdout
    assert "quantizer truncquant, E rounded to a power of two; " in inspected
    document = json.loads(run("inspect", "ckpt.pt", "--json", cwd=power_of_two_folder).stdout)
    assert document["scheme"]["power_of_two_scale"] is True
    assert all(np.log2(entry["magnitude"]) % 1 == 0 for entry in document["layers"] if entry["quantized"])


def test_a_file_with_other_scales_than_the_checkpoints_is_found_out(power_of_two_folder):
    model = load_checkpoint(power_of_two_folder / "ckpt.pt")
    x = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    ((_, right),) = export_onnx(model, (4,))
    set_quantizer(model.module, Scheme())
    ((_, wrong),) = export_onnx(model, (4,))
    set_quantizer(model.module, POWER_OF_TWO)
    assert compare(model, 4, run_file(right, x), x).passed
    assert not compare(model, 4, run_file(wrong, x), x).passed


def test_checkpoints_from_before_the_option_load(power_of_two_folder, tmp_path):
    content = torch.load(power_of_two_folder / "ckpt.pt", weights_only=True)
    del content["scheme"]["power_of_two_scale"]
    torch.save(content, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt").info.scheme == Scheme()
    content["scheme"]["quantizer"] = "magic"
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="damaged tqexport checkpoint: quantizer is 'magic', not one of"):
        load_checkpoint(tmp_path / "bad.pt")


def test_a_description_that_contradicts_the_training_is_not_saved(tmp_path):
    network = prepare(float_network(), (2, 8), scheme=POWER_OF_TWO)
    with pytest.raises(UsageError, match=r"layer 3 was trained with .*power_of_two_scale=True.* the description says"):
        save_checkpoint(tmp_path / "net.pt", network, CheckpointInfo("net:build", {}, (6,), (2, 8)))
    assert list(tmp_path.iterdir()) == []


def test_dorefa_trains_and_exports_codes_of_each_width():
    network = prepare(float_network(), (2, 8), scheme=Scheme("dorefa"))
    x, y = batch()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(joint_backward(network, x, y, (2, 8), nn.functional.cross_entropy))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model = TruncModel(network.eval(), CheckpointInfo("net:build", {}, (6,), (2, 8), Scheme("dorefa")))
    inputs = x.numpy()
    for bits, content in export_onnx(model, (2, 8)):
        assert compare(model, bits, run_file(content, inputs), inputs).passed
