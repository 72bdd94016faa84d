"""The research family's networks have the keys and the wiring described, and come through ONNX unharmed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from networks import assert_parity, model_of, randomize_, samples_for
from research import training_file
from torch import nn

from tqexport import ReadOptions, load_checkpoint
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.errors import InputError, UsageError
from tqexport.networks.research_models import RESEARCH_ARCHITECTURES, recognize, resnet20q
from tqexport.training.quantizers import Clamp, quantized_weights
from tqexport.training.widths import at_width

FAMILY = [1, 2, 4, 8, 32]
NATURAL = {
    "resnet20q": (3, 32, 32),
    "resnet50q": (3, 224, 224),
    "svhnq": (3, 40, 40),
    "preresnet18q": (3, 224, 224),
}


def build(architecture, arguments, *, device="cpu"):
    with torch.device(device):
        return RESEARCH_ARCHITECTURES[architecture](**arguments)


# number of keys = convolutions and their biases + 2 of fc + 5 for each BatchNorm of each width
LAYOUTS = {
    "any-precision": (
        "resnet20q",
        {"expansion": 5, "num_classes": 10, "variant": "any-precision", "widths": FAMILY},
        21 + 2 + 5 * (19 * 5 + 2),
        {
            "conv0.weight": (80, 3, 3, 3),
            "layers.0.bn0.bn_dict.32.running_var": (80,),
            "layers.0.conv0.weight": (80, 80, 3, 3),
            "layers.3.conv0.weight": (160, 80, 3, 3),
            "layers.3.bn1.bn_dict.1.num_batches_tracked": (),
            "layers.3.skip_conv.weight": (160, 80, 1, 1),
            "layers.6.skip_bn.running_mean": (320,),
            "layers.8.conv1.weight": (320, 320, 3, 3),
            "bn.bn_dict.8.weight": (320,),
            "fc.weight": (10, 320),
            "fc.bias": (10,),
        },
    ),
    "switchable": (
        "resnet20q",
        {"expansion": 1, "num_classes": 100, "variant": "switchable", "widths": [2, 4, 8]},
        21 + 2 + 5 * 21 * 3,
        {"layers.0.bn0.bn_dict.2.bias": (16,), "layers.3.skip_bn.bn_dict.4.weight": (32,), "fc.weight": (100, 64)},
    ),
    "shared-bn": (
        "resnet20q",
        {"expansion": 2, "num_classes": 10, "variant": "shared-bn", "widths": []},
        21 + 2 + 5 * 21,
        {"layers.0.bn0.weight": (32,), "layers.3.skip_bn.running_var": (64,), "bn.bias": (128,)},
    ),
    "resnet50q": (
        "resnet50q",
        {"num_classes": 1000, "widths": FAMILY, "planes": 64, "plain_downsample_norm": False},
        53 + 2 + 5 * 53 * 5,
        {
            "conv1.weight": (64, 3, 7, 7),
            "layer1.0.bn0.bn_dict.1.weight": (64,),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer1.0.downsample.1.bn_dict.32.weight": (256,),
            "layer1.2.conv0.weight": (64, 256, 1, 1),
            "layer2.3.conv1.weight": (128, 128, 3, 3),
            "layer3.5.bn2.bn_dict.2.running_mean": (256,),
            "layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
            "layer4.2.conv2.weight": (2048, 512, 1, 1),
            "bn.bn_dict.4.bias": (2048,),
            "fc.weight": (1000, 2048),
        },
    ),
    "resnet50q, plain": (
        "resnet50q",
        {"num_classes": 10, "widths": [], "planes": 8, "plain_downsample_norm": False},
        53 + 2 + 5 * 53,
        {"layer1.0.bn0.weight": (8,), "layer2.0.downsample.1.weight": (64,), "bn.running_var": (256,)},
    ),
    "resnet50q, plain shortcuts": (
        "resnet50q",
        {"num_classes": 10, "widths": [1, 2, 4, 8], "planes": 8, "plain_downsample_norm": True},
        53 + 2 + 5 * (49 * 4 + 4),
        {"layer1.0.bn0.bn_dict.1.weight": (8,), "layer2.0.downsample.1.weight": (64,)},
    ),
    "svhnq": (
        "svhnq",
        {"expansion": 8, "num_classes": 10, "widths": FAMILY},
        8 + 2 + 5 * 5 * 5,
        {
            "layers.0.weight": (48, 3, 5, 5),
            "layers.0.bias": (48,),
            "layers.3.weight": (64, 48, 3, 3),
            "layers.4.bn_dict.32.weight": (64,),
            "layers.7.bn_dict.1.running_var": (64,),
            "layers.10.weight": (128, 64, 3, 3),
            "layers.17.bn_dict.8.bias": (128,),
            "layers.20.weight": (512, 128, 5, 5),
            "fc.weight": (10, 512),
        },
    ),
    "svhnq, plain": (
        "svhnq",
        {"expansion": 1, "num_classes": 11, "widths": []},
        8 + 2 + 5 * 5,
        {"layers.4.weight": (8,), "layers.14.running_mean": (16,), "fc.bias": (11,)},
    ),
    "preresnet18q": (
        "preresnet18q",
        {"num_classes": 1000, "widths": [4, 8, 32], "planes": 64},
        20 + 2 + 5 * 17 * 3,
        {
            "model.conv1.weight": (64, 3, 7, 7),
            "model.bn1.bn_dict.4.weight": (64,),
            "model.layer1.0.bn1_2.bn_dict.8.weight": (64,),
            "model.layer1.1.pre_bn.bn_dict.32.bias": (64,),
            "model.layer2.0.pre_bn.bn_dict.4.bias": (64,),
            "model.layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "model.layer4.1.conv2.weight": (512, 512, 3, 3),
            "model.final_bn.bn_dict.8.running_mean": (512,),
            "model.fc.weight": (1000, 512),
        },
    ),
    "preresnet18q, plain": (
        "preresnet18q",
        {"num_classes": 10, "widths": [], "planes": 16},
        20 + 2 + 5 * 17,
        {"model.bn1.weight": (16,), "model.layer4.1.pre_bn.running_var": (128,)},
    ),
}


@pytest.mark.parametrize(("architecture", "arguments", "count", "shapes"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_state_dict_has_the_keys_of_the_family(architecture, arguments, count, shapes):
    state_dict = build(architecture, arguments, device="meta").state_dict()
    assert len(state_dict) == count
    assert {key: tuple(state_dict[key].shape) for key in shapes if key in state_dict} == shapes


@pytest.mark.parametrize(("architecture", "arguments"), [layout[:2] for layout in LAYOUTS.values()], ids=LAYOUTS)
def test_recognize_finds_what_was_built(architecture, arguments):
    state_dict = build(architecture, arguments, device="meta").state_dict()
    expected = architecture, arguments, NATURAL[architecture]
    assert recognize(state_dict) == expected
    assert recognize(state_dict, architecture) == expected


def test_no_network_is_taken_for_another():
    for architecture, arguments, *_ in LAYOUTS.values():
        state_dict = build(architecture, arguments, device="meta").state_dict()
        for other in set(NATURAL) - {architecture}:
            with pytest.raises(InputError, match=f"not those of {other}.*--model package.module:factory"):
                recognize(state_dict, other)


def test_an_unknown_name_is_refused_with_the_known_ones():
    state_dict = resnet20q().state_dict()
    with pytest.raises(UsageError, match=r"'vgg16q'.*preresnet18q, resnet20q, resnet50q, svhnq.*--model package.mod"):
        recognize(state_dict, "vgg16q")


@pytest.mark.parametrize("state_dict", [{}, nn.Linear(2, 2).state_dict(), {"fc.weight": torch.zeros(1)}])
def test_unknown_tensors_are_refused_with_the_known_names(state_dict):
    with pytest.raises(InputError, match=r"preresnet18q, resnet20q, resnet50q, svhnq.*--model package.module:factory"):
        recognize(state_dict)


def test_misshapen_tensors_are_refused_by_name():
    state_dict = resnet20q().state_dict()
    with pytest.raises(InputError, match=r"conv0\.weight has 17 output channels"):
        recognize({**state_dict, "conv0.weight": torch.zeros(17, 3, 3, 3)})
    with pytest.raises(InputError, match=r"no weight fc\.weight"):
        recognize({**state_dict, "fc.weight": torch.tensor(1.0)})
    shared = resnet20q(variant="shared-bn").state_dict()
    with pytest.raises(InputError, match=r"layers\.3\.skip_bn has a BatchNorm per width"):
        recognize({**shared, "layers.3.skip_bn.bn_dict.8.weight": torch.zeros(32)})


def test_an_unknown_variant_is_refused():
    with pytest.raises(UsageError, match="any-precision, switchable, shared-bn"):
        resnet20q(variant="other")


BLOCKS = [f"layers.{block}.conv{conv}" for block in range(9) for conv in (0, 1)]


@pytest.mark.parametrize(
    ("architecture", "arguments", "expected"),
    [
        ("resnet20q", {"variant": "any-precision"}, BLOCKS),
        ("resnet20q", {"variant": "switchable"}, [*BLOCKS, "layers.3.skip_conv", "layers.6.skip_conv"]),
        ("resnet20q", {"variant": "shared-bn"}, [*BLOCKS, "layers.3.skip_conv", "layers.6.skip_conv"]),
        (
            "resnet50q",
            {"planes": 4},
            [
                f"layer{stage}.{block}.conv{conv}"
                for stage, blocks in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True)
                for block in range(blocks)
                for conv in range(3)
            ],
        ),
        ("svhnq", {}, [f"layers.{index}" for index in (3, 6, 10, 13, 16, 20)]),
        (
            "preresnet18q",
            {"planes": 4},
            [
                *(f"model.layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)),
                *(f"model.layer{s}.0.downsample.0" for s in (2, 3, 4)),
            ],
        ),
    ],
)
def test_exactly_the_described_convolutions_are_quantised(architecture, arguments, expected):
    weights = quantized_weights(build(architecture, arguments))
    assert sorted(weights) == sorted(f"{layer}.weight" for layer in expected)


def trace(network, sample):
    """Input and output of each module that has a name, of one run at the widths the modules have."""
    inputs, outputs = {}, {}

    def keep(name):
        def hook(_module, args, output):
            inputs[name], outputs[name] = args[0], output

        return hook

    modules = {name: module for name, module in network.named_modules() if name and "parametrizations" not in name}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        network(sample)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("variant", ["any-precision", "switchable", "shared-bn"])
def test_resnet20q_is_wired_as_described(variant):
    inputs, outputs = trace(randomize_(resnet20q(variant=variant, widths=[8]), 1), torch.rand(1, 3, 32, 32))
    assert inputs["layers.3.skip_conv"] is inputs["layers.3.conv0"] is outputs["layers.3.act0"]
    assert torch.equal(outputs["layers.3"], outputs["layers.3.conv1"] + outputs["layers.3.skip_bn"])
    assert torch.equal(outputs["layers.4"], outputs["layers.4.conv1"] + inputs["layers.4"])
    assert outputs["layers.8"].shape == (1, 64, 8, 8)
    assert torch.equal(inputs["fc"], outputs["bn"].mean((2, 3)))  # no activation between


def test_resnet50q_is_wired_as_described():
    inputs, outputs = trace(randomize_(build("resnet50q", {"planes": 4}), 1), torch.rand(1, 3, 64, 64))
    assert inputs["layer1.0.bn0"] is outputs["maxpool"]
    assert inputs["maxpool"] is outputs["conv1"]
    for block in ("layer1.0", "layer3.0"):
        assert inputs[f"{block}.downsample.0"] is inputs[block]  # the raw input
        assert torch.equal(outputs[block], outputs[f"{block}.conv2"] + outputs[f"{block}.downsample.1"])
        assert inputs[f"{block}.conv2"] is outputs[f"{block}.act2"]
    assert torch.equal(outputs["layer1.1"], outputs["layer1.1.conv2"] + inputs["layer1.1"])
    assert outputs["layer2.0.conv0"].shape[2:] == (16, 16)  # the stride is the 3x3 convolution's
    assert outputs["layer2.0.conv1"].shape[2:] == (8, 8)
    assert torch.allclose(inputs["fc"], outputs["act"].mean((2, 3)))


def test_preresnet18q_is_wired_as_described():
    network = randomize_(build("preresnet18q", {"planes": 4}), 1)
    inputs, outputs = trace(network, torch.rand(1, 3, 224, 224))
    assert inputs["model.layer1.0.conv1"] is inputs["model.layer1.0"]
    assert inputs["model.layer2.0.conv1"] is inputs["model.layer2.0.downsample.0"] is outputs["model.layer2.0.pre_act"]
    for block, shortcut in {
        "model.layer1.0": inputs["model.layer1.0"],
        "model.layer1.1": inputs["model.layer1.1"],
        "model.layer2.0": outputs["model.layer2.0.downsample.0"],
    }.items():
        assert torch.equal(outputs[block], outputs[f"{block}.conv2"] + shortcut)
    assert inputs["model.avgpool"] is outputs["model.final_relu"]
    assert inputs["model.avgpool"].shape == (1, 32, 7, 7)


def test_svhnq_only_clamps_before_the_classifier():
    network = build("svhnq", {"expansion": 1})
    x = torch.tensor([-0.5, 0.3, 1.5])
    assert isinstance(network.layers[21], Clamp)
    for bits in (1, 2, 4, 8):
        with at_width(network, bits):
            assert torch.equal(network.layers[21](x), torch.tensor([0.0, 0.3, 1.0]))


def test_svhnq_is_relu_before_the_classifier_when_activations_have_32_bits():
    network = build("svhnq", {"expansion": 1})
    x = torch.tensor([-0.5, 0.3, 1.5])
    with at_width(network, 4, activation_bits=32):
        assert torch.equal(network.layers[21](x), x.relu())


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("resnet20q", {}), ("resnet50q", {"planes": 4}), ("svhnq", {"expansion": 1}), ("preresnet18q", {"planes": 4})],
)
def test_the_natural_input_gives_a_row_of_logits_per_sample(architecture, arguments):
    network = build(architecture, {**arguments, "num_classes": 7}).eval()
    with torch.no_grad(), at_width(network, 4) as reference:
        assert reference(torch.rand(2, *NATURAL[architecture])).shape == (2, 7)


PARITY = {
    "resnet20q, any-precision": ("resnet20q", {"variant": "any-precision", "widths": FAMILY}, (3, 9, 14), False),
    "resnet20q, switchable": ("resnet20q", {"variant": "switchable", "num_classes": 5}, (3, 15, 9), False),
    "resnet20q, corrected": ("resnet20q", {"variant": "switchable", "num_classes": 5}, (3, 15, 9), True),
    "resnet20q, shared-bn": ("resnet20q", {"variant": "shared-bn", "widths": []}, (3, 11, 11), False),
    "svhnq": ("svhnq", {"expansion": 2, "widths": FAMILY}, (3, 43, 41), False),
    "svhnq, plain": ("svhnq", {"expansion": 1, "widths": []}, (3, 40, 42), False),
    "preresnet18q": ("preresnet18q", {"planes": 8, "num_classes": 6, "widths": FAMILY}, (3, 193, 200), False),
    "resnet50q": ("resnet50q", {"planes": 4, "num_classes": 11, "widths": FAMILY}, (3, 47, 33), False),
}


@pytest.mark.parametrize(("architecture", "arguments", "shape", "correction"), PARITY.values(), ids=PARITY)
def test_parity_of_every_architecture(tmp_path, architecture, arguments, shape, correction):
    """From the file that the training scripts write."""
    torch.save(training_file(randomize_(build(architecture, arguments), 1), architecture), tmp_path / "net.pth.tar")
    model = load_checkpoint(tmp_path / "net.pth.tar", ReadOptions(input_shape=shape, bias_correction=correction))
    widths = (1, 2, 4, 8) if architecture == "svhnq" else (1, 8)  # of the others each graph is much larger
    files = dict(export_onnx(model, widths))
    found = onnx_parity(model, files)
    if "switchable" not in arguments.values() and "shared-bn" not in arguments.values():  # the graph of any-precision
        converted = convert_to_tflite([onnx.load_from_string(files[bits]) for bits in widths])
        found += assert_parity(model, dict(zip(widths, converted, strict=True)), 3)
    for verdict in found:
        assert verdict.codes > 10_000
        assert verdict.activations > 1_000


def test_parity_with_float_activations():
    arguments = {"expansion": 1, "widths": FAMILY}
    model = model_of(randomize_(build("svhnq", arguments), 1), NATURAL["svhnq"], (2, 8), activation_bits=(32, 32))
    onnx_parity(model, dict(export_onnx(model, (2, 8))))


def onnx_parity(model, files):
    """Every logit within 1e-5 of the largest, of samples far enough apart for that to prove something."""
    for bits in files:
        with torch.no_grad(), model.at_width(bits) as reference:
            logits = reference(torch.from_numpy(samples_for(model, 3))).numpy()
        assert logits.std(axis=0).mean() > 1e-3 * np.abs(logits).max()
    verdicts = assert_parity(model, files, 3)
    assert all(found.output_error <= 1e-5 for found in verdicts)
    return verdicts
