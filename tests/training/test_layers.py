"""Layers, estimators, widths, and turning an ordinary network into a truncation-ready one."""

from __future__ import annotations

import pytest
import torch
from networks import float_weight
from torch import nn

from tqexport import (
    ActivationQuantizer,
    Scheme,
    SwitchableBatchNorm2d,
    TruncLinear,
    at_width,
    calibrate_batch_norms,
    joint_backward,
    prepare,
)
from tqexport.errors import InputError, UsageError
from tqexport.training.quantizers import quantize_weight, quantized_weights
from tqexport.truncation import FLOAT_BITS, WIDTHS, max_code, store


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, (3, 1)),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 4 * 8, 6),
        nn.ReLU(),
        nn.Linear(6, 2),
    )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", [Scheme(), Scheme("dorefa"), Scheme(bias_correction=True)])
def test_a_layer_multiplies_with_the_stored_weight(bits, scheme):
    weight = torch.randn(6, 5, 3, 2)
    stored = store(weight, bits, scheme)
    expected = (stored.codes >> stored.shift).float() * stored.affine.scale + stored.affine.offset
    assert torch.allclose(quantize_weight(weight, bits, scheme), expected, atol=2e-6)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_estimators_differ_by_the_papers_factor(bits):
    weight = torch.randn(4, 3, requires_grad=True)
    upstream = torch.randn(4, 3)
    (identity,) = torch.autograd.grad(quantize_weight(weight, bits), weight, upstream)
    (scaled,) = torch.autograd.grad(quantize_weight(weight, bits, estimator="scaled"), weight, upstream)
    steps = max_code(bits)
    assert identity.abs().sum() > 0
    assert torch.allclose(scaled, identity * steps / (steps + 1))


def test_the_identity_gradient_is_that_of_the_smooth_map():
    weight = torch.randn(4, 3, requires_grad=True)
    upstream = torch.randn(4, 3)
    squashed = weight.tanh()
    smooth = weight.abs().mean().detach() * squashed / squashed.abs().max()
    (expected,) = torch.autograd.grad(smooth, weight, upstream)
    (got,) = torch.autograd.grad(quantize_weight(weight, 3), weight, upstream)
    assert torch.allclose(got, expected, atol=1e-6)


def test_activation_gradient_stops_outside_of_the_clamp():
    x = torch.tensor([-0.5, 0.2, 0.9, 1.5], requires_grad=True)
    ActivationQuantizer()(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_a_width_lasts_as_long_as_its_block():
    network = prepare(small_network())
    before = [module.bits for module in network.modules() if hasattr(module, "bits")]
    with at_width(network, 2, activation_bits=4):
        assert {weight.quantizer.bits for weight in quantized_weights(network).values()} == {2}
        assert {m.bits for m in network.modules() if isinstance(m, ActivationQuantizer)} == {4}
    with pytest.raises(RuntimeError), at_width(network, 2):
        network(torch.zeros(1))
    assert [module.bits for module in network.modules() if hasattr(module, "bits")] == before


def test_each_width_has_its_own_batch_norm():
    norm = SwitchableBatchNorm2d(3, [2, 8])
    assert sorted(norm.state_dict()) == sorted(
        f"bn_dict.{bits}.{key}"
        for bits in (2, 8)
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    )
    with at_width(norm, 2):
        norm(torch.randn(4, 3, 2, 2) + 5)
    assert norm.bn_dict["2"].running_mean.abs().min() > 0.1
    assert norm.bn_dict["8"].running_mean.abs().max() == 0
    with pytest.raises(InputError, match="no BatchNorm for 4 bits; this network has 2, 8"), at_width(norm, 4):
        norm(torch.zeros(1, 3, 2, 2))


def test_prepare_leaves_first_and_last_layer_float_and_the_original_alone():
    original = small_network()
    keys = list(original.state_dict())
    prepared = prepare(original, widths=[1, 8])
    assert list(quantized_weights(prepared)) == ["3.weight", "7.weight"]
    others = {0: nn.Conv2d, 1: SwitchableBatchNorm2d, 2: ActivationQuantizer, 6: nn.Flatten, 9: nn.Linear}
    assert {index: type(prepared[index]) for index in others} == others
    assert list(original.state_dict()) == keys
    assert torch.equal(float_weight(prepared[3]), original[3].weight)
    assert float_weight(prepared[3]) is not original[3].weight


def test_a_quantised_layer_is_the_layer_that_it_was_with_another_weight():
    original = small_network()
    prepared = prepare(original, widths=[1, 8])
    assert isinstance(prepared[3], nn.Conv2d)
    x = torch.randn(2, 4, 6, 8)
    for bits in (1, 8, FLOAT_BITS):
        with at_width(prepared, bits):
            expected = nn.functional.conv2d(x, quantize_weight(original[3].weight, bits), original[3].bias)
            assert torch.equal(prepared[3](x), expected)


def test_state_dicts_have_plain_keys_in_the_usual_order_and_load_again():
    float_keys = list(small_network()[3].state_dict())
    prepared = prepare(small_network())
    state = prepared.state_dict()
    assert [key for key in state if key.startswith("3.")] == [f"3.{key}" for key in float_keys]
    assert not any("parametrizations" in key for key in state)
    other = prepare(small_network())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(float_weight(other[3]), float_weight(prepared[3]))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(float_weight(other[3]), float_weight(prepared[3]))
    with pytest.raises(RuntimeError, match=r'Missing key.*"3.parametrizations.weight.original"'):
        other.load_state_dict({key: value for key, value in state.items() if key != "3.weight"})


def test_assigning_a_weight_sets_the_float_one():
    layer = TruncLinear(3, 2)
    layer.weight = torch.tensor([[0.5, -0.25, 0.0], [1.0, 0.1, 0.2]])
    assert float_weight(layer).tolist()[0] == [0.5, -0.25, 0.0]


def test_prepare_takes_the_choice_by_name_and_a_bare_layer():
    prepared = prepare(small_network(), float_layers=["3"], quantize_activations=False)
    assert [*quantized_weights(prepared)] == ["0.weight", "7.weight", "9.weight"]
    assert type(prepared[2]) is nn.ReLU
    assert [*quantized_weights(prepare(nn.Conv1d(2, 2, 1), float_layers=[]))] == ["weight"]
    with pytest.raises(UsageError, match=r"float_layers names \['nope'\]"):
        prepare(small_network(), float_layers=["nope"])
    tied = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    tied[3].weight = tied[1].weight  # a deployed network frees the floats of quantised weights
    with pytest.raises(UsageError, match="3 stays in float and has the same weight as 1, which is quantised"):
        prepare(tied, float_layers=["3"])
    assert [*quantized_weights(prepare(tied))] == ["2.weight"]
    assert len(quantized_weights(prepare(tied, float_layers=["0"]))) == 3
    with pytest.raises(UsageError, match=r"nothing is left to quantise of the layers \['0', '1'\]"):
        prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_an_encoder_layer_computes_with_its_quantised_layers():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)  # PyTorch has a quick path around them
    prepared = prepare(layer, float_layers=[]).eval()
    x = torch.randn(2, 3, 4)
    outputs = []
    for bits in (1, 8):
        with torch.no_grad(), at_width(prepared, bits):
            outputs.append(prepared(x))
    assert not torch.allclose(*outputs)


def test_a_module_used_twice_stays_one_module():
    shared = nn.ReLU()
    prepared = prepare(nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared), float_layers=[])
    assert prepared[1] is prepared[3]
    assert isinstance(prepared[3], ActivationQuantizer)


def test_joint_training_and_calibration_reach_every_width():
    network = prepare(small_network(), widths=(2, 8))
    x, y = torch.randn(16, 3, 8, 10), torch.randint(0, 2, (16,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(joint_backward(network, x, y, (2, 8), nn.functional.cross_entropy))
        optimizer.step()
    assert losses[-1] < losses[0]

    trained = {key: value.clone() for key, value in network.state_dict().items()}
    calibrate_batch_norms(network, [x], [4])
    assert all(torch.equal(network.state_dict()[key], value) for key, value in trained.items())
    assert torch.equal(network[1].bn_dict["4"].weight, network[1].bn_dict["8"].weight)
    with torch.no_grad(), at_width(network, 4):
        mean = network[0](x).mean((0, 2, 3))
    assert torch.allclose(network[1].bn_dict["4"].running_mean, mean, atol=1e-5)
    with pytest.raises(UsageError, match="BatchNorm for 4 bits already"):
        calibrate_batch_norms(network, [x], [4])
