"""TFLite files: one byte per weight with the trained levels, whatever the converter did to the layer."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from networks import Layers, assert_parity, convert, model_of, one_dimensional, randomize_
from places import artifact
from torch import nn

from tqexport import CheckpointInfo, InputInfo, Scheme, TruncModel, prepare
from tqexport.backends import run_file
from tqexport.backends.onnx.file import coded_weights
from tqexport.backends.tflite import template
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.encode import put_codes_back
from tqexport.backends.tflite.file import METADATA_NAME
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.integers import stored_integers
from tqexport.errors import ConversionError, InputError

WIDTHS = range(1, 9)


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_byte_per_quantised_weight_and_no_float_copy(exported_once, bits):
    flat = FlatModel(artifact(exported_once, "tflite", bits))
    integers = stored_integers(flat)
    assert len(integers) == 8
    assert sum(len(places) for places in integers.values()) == 8
    floats = [
        value.size
        for i in range(len(flat.graph.tensors))
        if (value := flat.constant(i)) is not None and value.dtype == np.float32
    ]
    assert max(floats) == 640  # the classifier, which stays float
    stored = sum(value.size for places in integers.values() for value in places)
    assert stored == 76_288 if bits < 8 else 76_288 < stored < 1.05 * 76_288
    assert len(artifact(exported_once, "tflite", bits)) <= 1.03 * (76_288 + 4 * 3_290) + 30_000


def test_only_plain_operators(exported_once):
    flat = FlatModel(artifact(exported_once, "tflite", 8))
    assert {flat.operator_name(operator) for operator in flat.graph.operators} == {
        "DEQUANTIZE", "CONV_2D", "FULLY_CONNECTED", "MINIMUM", "RELU", "MUL", "ROUND", "ADD", "PAD", "MEAN",
        "SUM", "CONCATENATION",
    }  # fmt: skip


def test_a_file_describes_itself(digits, exported_once):
    content = artifact(exported_once, "tflite", 4)
    facts = json.loads(FlatModel(content).metadata(METADATA_NAME))
    assert (facts["width"], facts["quantizer"], facts["layout"]) == (4, "truncquant", "channels last")
    assert facts["checkpoint_sha256"] == digits.sha256
    signature = Interpreter(model_content=content).get_signature_list()["serving_default"]
    assert signature == {"inputs": ["input"], "outputs": ["output"]}


def test_the_same_network_gives_the_same_bytes_whatever_is_converted_with_it(exported_once, converted_anew):
    alone = convert_to_tflite([onnx.load(exported_once / "out" / "ckpt-w3.onnx")])
    assert alone == [artifact(exported_once, "tflite", 3)]


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(bias_correction=True), Scheme("dorefa")])
def test_layer_kinds_with_negative_batch_norm_gains(scheme):
    network = randomize_(prepare(Layers(), (1, 4, 8), scheme=scheme), 3)
    gains = [module.weight for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert any((gain < 0).any() for gain in gains)
    model = model_of(network, (3, 9, 10), scheme=scheme)
    assert_parity(model, convert(model))


def test_fixed_and_float_activations():
    network = randomize_(prepare(Layers(), (2, 8)), 4)
    model = model_of(network, (3, 9, 10), (2, 8), activation_bits=(4, 32))
    assert_parity(model, convert(model))


def test_a_channel_that_batch_norm_silenced_keeps_its_codes():
    network = randomize_(prepare(Layers(), (1, 4, 8)), 5)
    for bits in ("1", "4", "8"):
        network.norm2.bn_dict[bits].weight.data[3] = 0
    model = model_of(network, (3, 9, 10))
    assert_parity(model, convert(model))


def test_one_dimensional_convolutions():
    model = model_of(randomize_(prepare(one_dimensional(), (1, 4, 8)), 6), (3, 14))
    assert_parity(model, convert(model))


def test_fully_connected_networks():
    network = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5), nn.ReLU(), nn.Linear(5, 3))
    model = model_of(randomize_(prepare(network, (1, 4, 8)), 7), (7,))
    assert_parity(model, convert(model))


def test_an_input_may_have_any_name():
    network = prepare(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (2, 8))
    model = TruncModel(network.eval(), CheckpointInfo("test", {}, (InputInfo("file", (7,)),), (2, 8)))
    assert_parity(model, convert(model))


def conversions(monkeypatch):
    """Counts the networks that go through onnx2tf."""
    counts = []
    original = template.run_onnx2tf

    def counted(models, samples):
        counts.append(len(models))
        return original(models, samples)

    monkeypatch.setattr(template, "run_onnx2tf", counted)
    return counts


def test_all_widths_cost_one_conversion(monkeypatch):
    counts = conversions(monkeypatch)
    network = nn.Sequential(
        nn.Linear(7, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    )
    model = model_of(randomize_(prepare(network, WIDTHS), 8), (7,), WIDTHS)
    assert_parity(model, convert(model))
    assert counts == [1]


class LearnedScale(nn.Module):
    """The converter multiplies such a scale into the filter before it."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, (3, 1), bias=False), nn.Conv2d(5, 2, 1)
        self.scale = nn.Parameter(torch.tensor([0.5, -0.7, 1.1, 0.9, 1.3]).reshape(5, 1, 1))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.last(self.middle(self.act(self.first(x))) * self.scale).mean((2, 3))


def test_parameters_that_the_converter_combines(monkeypatch):
    counts = conversions(monkeypatch)
    model = model_of(randomize_(prepare(LearnedScale(), (1, 4, 8)), 9), (2, 8, 9))
    assert_parity(model, convert(model))
    assert counts == [1]


class ScalesAndShifts(nn.Module):
    """A chain of layers, scales and shifts, which the converter makes one filter and one bias of."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scales = nn.ParameterList(torch.tensor([0.5, -0.7, 1.1, 0.9, 1.3, 0.8, -1.2, 0.6]) * i for i in (1, 2, 3))
        self.shifts = nn.ParameterList(torch.arange(8) / i for i in (3, 5, 7))

    def forward(self, x):
        x = self.first(x)
        for scale, shift in zip(self.scales, self.shifts, strict=True):
            x = x * scale + shift
        return self.last(self.middle(x).relu() * self.scales[0])


def test_parameters_that_the_converter_combines_beyond_recognition(monkeypatch):
    counts = conversions(monkeypatch)
    model = model_of(randomize_(prepare(ScalesAndShifts(), (1, 4, 8)), 9), (6,))
    assert_parity(model, convert(model))
    assert counts == [1, 1]  # the second time it does not know them


def test_a_layer_whose_codes_are_not_found_is_named(exported_once):
    flat = FlatModel(artifact(exported_once, "tflite", 4))  # holds integers, so no float filter matches
    weights = coded_weights(onnx.load(exported_once / "out" / "ckpt-w4.onnx"))
    with pytest.raises(ConversionError, match=r"weights of layer layers.0.conv0 are not recognisable.*8 of 8"):
        put_codes_back(flat, weights, [], "exact")


class Ending(nn.Module):
    """Two convolutions and then whatever there is to try."""

    def __init__(self, ending):
        super().__init__()
        self.first, self.conv, self.act, self.ending = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.ReLU(), ending

    def forward(self, x):
        return self.ending(self.conv(self.act(self.first(x))))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def convert_ending(ending):
    model = model_of(randomize_(prepare(Ending(ending), (2, 8), float_layers=["first"]), 4), (3, 9, 10), (2, 8))
    return model, convert(model)


def test_operators_between_layers():
    ending = nn.Sequential(
        nn.GELU(), nn.Conv2d(8, 8, 1), nn.Softplus(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.SiLU(),
        nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.ConstantPad2d((1, 0, 2, 1), 0.5), nn.PReLU(),
        nn.Conv2d(2, 4, (1, 2)), nn.InstanceNorm2d(4), nn.Hardsigmoid(), nn.AvgPool2d(2, ceil_mode=True),
        nn.ConvTranspose2d(4, 3, 3, stride=2), nn.Mish(), nn.Flatten(), nn.LogSoftmax(1),
    )  # fmt: skip
    assert_parity(*convert_ending(ending))


def test_operators_that_the_converter_gets_wrong_are_written_as_others():
    """All axes are of one size, so that no wrong order of them shows in a shape."""
    norms = nn.Sequential(nn.LayerNorm((8, 8, 8)), nn.GroupNorm(2, 8))
    for parameter in norms.parameters():
        nn.init.normal_(parameter)
    table = torch.randn(8, 8, 8)
    ending = nn.Sequential(
        nn.ZeroPad2d((1, 1, 1, 2)), norms, Function(lambda x: torch.maximum(x, table) * table),
        Function(lambda x: nn.functional.pixel_unshuffle(x, 2)),
    )  # fmt: skip
    assert_parity(*convert_ending(ending))


def test_an_output_that_keeps_its_axes_is_said_to():
    model, files = convert_ending(Function(lambda x: x.flatten(2).softmax(-1)))
    assert_parity(model, files)
    flat = FlatModel(files[8])
    assert json.loads(flat.metadata(METADATA_NAME))["channels_first"] == ["output"]
    assert list(flat.tensor(flat.graph.outputs[0]).shape) == [1, 8, 30]


class Tokens(nn.Module):
    """A transformer over tokens (N, T, C): no convolution says which axis holds the channels."""

    def __init__(self):
        super().__init__()
        self.embedding, self.classifier = nn.Linear(5, 12), nn.Linear(12, 3)
        self.encoder = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, activation=nn.ReLU())

    def forward(self, x):
        return self.classifier(self.encoder(self.embedding(x)).mean(1))


def test_attention_over_tokens():
    torch.manual_seed(3)
    model = model_of(prepare(Tokens(), (2, 8)), (8, 5), (2, 8))
    assert_parity(model, convert(model))


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (Function(lambda x: torch.erf(x)), r"operators that TFLite does not: Erf \(ending/Erf\)"),
        (
            Function(lambda x: nn.functional.interpolate(x, size=(3, 4), mode="bilinear", antialias=True)),
            r"onnx2tf could not convert the network: ",
        ),
        (
            Function(lambda x: x[:, :5, :, :5].tril()),
            r"changed what the network computes: output .* Trilu \(ending/Trilu\)",
        ),
    ],
    ids=["known before", "onnx2tf fails", "onnx2tf gets it wrong"],
)
def test_what_cannot_be_converted_is_refused_by_name(ending, words):
    with pytest.raises(ConversionError, match=words):
        convert_ending(ending)


def test_damaged_files_are_refused(exported_once):
    x = np.zeros((1, 1, 8, 8), np.float32)
    for content in (b"", b"TFL3", b"\x00" * 64, artifact(exported_once, "tflite", 8)[:2000]):
        with pytest.raises(InputError):
            run_file(content, x)


def test_samples_of_another_shape_are_refused(exported_once):
    with pytest.raises(InputError, match=r"takes samples of shape \(8, 8, 1\), channels last, not \(9, 8, 1\)"):
        run_file(artifact(exported_once, "tflite", 8), np.zeros((1, 1, 9, 8), np.float32))


def test_conversion_leaves_no_file_behind(exported_once, converted_anew, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    convert_to_tflite([onnx.load(exported_once / "out" / "ckpt-w8.onnx")])
    assert list(tmp_path.iterdir()) == []
