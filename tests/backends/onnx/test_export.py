"""ONNX files: codes, one shift per layer, nothing of this machine, one capture for every width."""

from __future__ import annotations

import getpass
import os

import numpy as np
import onnx
import pytest
import torch
from networks import float_weight, model_of, randomize_
from onnx import numpy_helper
from places import artifact
from torch import nn

from tqexport import CheckpointInfo, Scheme, TruncModel, prepare
from tqexport.backends import run_file
from tqexport.backends.onnx import export
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.file import coded_weights, parse, read_facts
from tqexport.backends.tflite.float_graph import with_float_weights
from tqexport.errors import ConversionError, InputError
from tqexport.facts import facts_of_model
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import direct_codes, normalize


@pytest.fixture(scope="module")
def files(exported_once) -> dict[int, bytes]:
    return {bits: artifact(exported_once, "onnx", bits) for bits in range(1, 9)}


def test_every_quantised_layer_is_uint8_codes_and_a_bitshift(digits, files):
    weights = quantized_weights(digits.module)
    for bits, content in files.items():
        model = onnx.load_from_string(content)
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        shifts = [node for node in model.graph.node if node.op_type == "BitShift"]
        assert len(shifts) == len(weights) == 8
        for name, weight in weights.items():
            codes = direct_codes(normalize(weight.original.detach()), 8).byte().numpy()
            assert values[f"{name}.codes"].dtype == np.uint8
            assert np.array_equal(values[f"{name}.codes"], codes)
            assert values[f"{name}.shift"] == 8 - bits
            assert values[f"{name}.shift"].dtype == np.uint8
        by_input = {node.input[0]: node for node in model.graph.node}
        chain = ["BitShift", "Cast", "Mul", "Add"]
        for node in shifts:
            for op_type in chain:
                assert node.op_type == op_type
                node = by_input[node.output[0]] if op_type != "Add" else node
        floats = sum(v.size for v in values.values() if v.dtype == np.float32)
        assert floats < 3500  # no float copy of a quantised weight


def test_the_codes_are_the_same_in_every_file(files):
    weights = {bits: coded_weights(onnx.load_from_string(content)) for bits, content in files.items()}
    for found in weights.values():
        assert all(np.array_equal(a.codes, b.codes) for a, b in zip(found, weights[8], strict=True))


def test_every_width_comes_from_one_capture(digits, monkeypatch):
    captures = []
    original = export.capture
    monkeypatch.setattr(export, "capture", lambda *args, **kwargs: captures.append(1) or original(*args, **kwargs))
    assert len(list(export_onnx(digits, (1, 4, 8)))) == 3
    assert len(captures) == 1


def test_the_same_network_gives_the_same_bytes_whatever_else_is_exported(digits, files):
    assert dict(export_onnx(digits, (4,)))[4] == files[4]


def test_a_file_says_what_it_is_and_nothing_of_this_machine(digits, files):
    model = onnx.load_from_string(files[4])
    assert read_facts(model) == facts_of_model(digits, 4, "channels first")
    assert model.opset_import[0].version == 20
    assert model.ir_version == 10
    for local in (os.getcwd(), getpass.getuser() + "/", "site-packages", ".py", "pkg.torch"):
        assert local.encode() not in files[4]


def test_the_batch_is_free(files):
    dims = onnx.load_from_string(files[8]).graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    for samples in (1, 3):
        assert run_file(files[8], np.zeros((samples, 1, 8, 8), np.float32)).output.shape == (samples, 10)


def test_an_ordinary_float_network_can_be_had_from_a_file(files):
    model = onnx.load_from_string(files[2])
    folded = with_float_weights(model, coded_weights(model))
    onnx.checker.check_model(folded, full_check=True)
    assert not {"BitShift", "Cast"} & {node.op_type for node in folded.graph.node}
    x = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    assert np.allclose(run_file(folded.SerializeToString(), x).output, run_file(files[2], x).output, atol=1e-5)


class Odd(nn.Module):
    """Groups, dilation, no square anywhere, one layer used twice, a bias, a linear layer over a flattened map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 2))
        self.grouped = nn.Conv2d(6, 6, (1, 3), groups=2, dilation=(1, 2), padding=(0, 2))
        self.twice = nn.Conv2d(6, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.hidden = nn.Linear(6 * 7 * 4, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.act(self.twice(self.act(self.grouped(x))))
        x = self.act(self.twice(x))
        return self.last(self.hidden(x.flatten(1)))


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("dorefa"), Scheme(bias_correction=True)])
@pytest.mark.parametrize("activation_bits", [(), (32, 32, 32), (4, 4, 32)])
def test_any_module_that_torch_can_capture(scheme, activation_bits):
    torch.manual_seed(0)
    network = randomize_(prepare(Odd(), (1, 3, 8), scheme=scheme), 1)
    model = model_of(network, (3, 9, 5), (1, 3, 8), scheme, activation_bits)
    x = torch.rand(5, 3, 9, 5)
    for bits, content in export_onnx(model, (1, 3, 8)):
        with torch.no_grad(), model.at_width(bits) as reference:
            expected = reference(x).numpy()
        run = run_file(content, x.numpy())
        assert np.abs(run.output - expected).max() <= 1e-5 * np.abs(expected).max()
        codes = direct_codes(normalize(float_weight(network.twice).detach()), bits, scheme.quantizer).byte().numpy()
        assert len(run.codes["twice.weight"]) >= 1
        assert all(np.array_equal(place, codes) for place in run.codes["twice.weight"])


def test_what_cannot_be_captured_is_refused_in_one_sentence():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    network = prepare(Branches(), (8,), float_layers=[]).eval()
    model = TruncModel(network, CheckpointInfo("branches", {}, (4,), (8,)))
    with pytest.raises(
        ConversionError, match=r"decides by the values of a sample .*test_export.py, line \d+: return self.layer"
    ) as caught:
        list(export_onnx(model, (8,)))
    assert "\n" not in str(caught.value)


def test_foreign_and_damaged_onnx_files_are_refused(files):
    for content in (b"", b"\x08", files[8][: len(files[8]) // 2], b"hello"):
        with pytest.raises(InputError):
            parse(content)
    external = onnx.load_from_string(files[8])
    tensor = external.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "../../etc/passwd")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(InputError):
        parse(external.SerializeToString())
