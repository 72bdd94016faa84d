"""LSTM, GRU and RNN: weights for the input and for the state, of several layers and directions in one module."""

from __future__ import annotations

import copy
import re

import numpy as np
import onnx
import pytest
import torch
from exactness import assert_exact, verdicts
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, TruncModel, prepare
from tqexport.artifacts.truncate import truncate_file
from tqexport.backends import backend_of, open_runner, run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.runtime_file import merge_onnx
from tqexport.backends.tflite.convert import check_convertible, convert_to_tflite
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.backends.tflite.unrolled import MOST_STEPS
from tqexport.errors import ConversionError
from tqexport.training.quantizers import quantized_weights
from tqexport.training.widths import at_width
from tqexport.verification.comparison import compare

WIDTHS = (2, 8)
SHAPE = (2, 6)
KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones; steps or samples come first in it."""

    def __init__(self, kind, **options):
        super().__init__()
        self.first, self.act = nn.Linear(6, 7), nn.ReLU()
        self.recurrent = kind(7, 5, **options)
        self.last = nn.Linear(10 if self.recurrent.bidirectional else 5, 3)

    def forward(self, x):
        x = self.act(self.first(x))
        if self.recurrent.batch_first:
            return self.last(self.recurrent(x)[0])
        return self.last(self.recurrent(x.transpose(0, 1))[0].transpose(0, 1))


class Rounding(nn.Module):
    """A recurrent layer whose states are rounded, in front of one whose states are rounded behind a linear layer."""

    def __init__(self, kind, other, **options):
        super().__init__()
        self.first, self.act0, self.a, self.act1 = nn.Linear(6, 7), nn.ReLU(), kind(7, 5, **options), nn.ReLU()
        self.b = other((1 + self.a.bidirectional) * (self.a.proj_size or 5), 4, batch_first=self.a.batch_first)
        self.middle, self.act2, self.last = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        x = self.act0(self.first(x))
        x = x if self.a.batch_first else x.transpose(0, 1)
        x = self.last(self.act2(self.middle(self.b(self.act1(self.a(x)[0]))[0])))
        return x if self.a.batch_first else x.transpose(0, 1)


class Both(nn.Module):
    """An LSTM, whose last state is used as well, and a GRU in both directions; then a layer without gates."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.lstm = nn.Linear(6, 7), nn.ReLU(), nn.LSTM(7, 5, batch_first=True)
        self.gru, self.rnn = nn.GRU(5, 4, batch_first=True, bidirectional=True), nn.RNN(8, 3, batch_first=True)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        x, (state, cell) = self.lstm(self.act(self.first(x)))
        return self.last(self.rnn(self.gru(x)[0])[0]), state[-1] + cell[-1]


def prepared(network, std=0.4):
    torch.manual_seed(4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return prepare(network, WIDTHS).eval()


def model_of(network, shape=SHAPE):
    return TruncModel(network, CheckpointInfo("test", {}, shape, WIDTHS))


@every_kind
def test_it_computes_with_the_quantised_weights_of_every_layer_and_direction(kind):
    options = {"num_layers": 2, "bidirectional": True}
    layer = prepare(nn.Sequential(kind(4, 3, **options)), WIDTHS, float_layers=[])[0]
    assert len(quantized_weights(layer)) == 8
    x = torch.rand(5, 2, 4)
    for bits in WIDTHS:
        plain = kind(4, 3, **options)
        with torch.no_grad(), at_width(layer, bits):
            for name in dict(plain.named_parameters()):
                getattr(plain, name).copy_(getattr(layer, name))
            assert torch.equal(layer(x)[0], plain(x)[0])


@every_kind
def test_it_trains_is_copied_after_a_call_and_keeps_the_names_of_a_float_layer(kind):
    plain = nn.Sequential(kind(4, 3))
    network = prepare(plain, WIDTHS, float_layers=[])
    assert set(network.state_dict()) == set(plain.state_dict())
    x = torch.rand(5, 2, 4)
    network(x)[0].square().sum().backward()
    assert all(float(weight.original.grad.abs().sum()) > 0 for weight in quantized_weights(network).values())
    copied = copy.deepcopy(network)
    copied.load_state_dict({name: 2 * value for name, value in plain.state_dict().items()})
    assert torch.equal(network(x)[0], prepare(plain, WIDTHS, float_layers=[])(x)[0])
    assert not torch.equal(copied(x)[0], network(x)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}, id="LSTM, all of them"),
        pytest.param(nn.GRU, {"bias": False}, id="GRU, steps first, without biases"),
    ],
)
def test_it_is_exact_in_onnx(kind, options):
    model = model_of(prepared(Recurrent(kind, **options)))
    files = dict(export_onnx(model, WIDTHS))
    switched = merge_onnx(files.items())
    for bits, content in files.items():
        for verdict in (*verdicts(model, content, bits), *verdicts(model, switched, bits, switched=True)):
            assert verdict.passed, verdict.problems
            assert verdict.codes == sum(weight.original.numel() for weight in quantized_weights(model.module).values())
            assert verdict.output_bound < 1e-4


def changed(content, name, change):
    """An ONNX file with a constant changed."""
    file = onnx.load_from_string(content)
    tensor = next(tensor for tensor in file.graph.initializer if tensor.name == name)
    value = numpy_helper.to_array(tensor).copy()
    change(value)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return file.SerializeToString()


def flip_a_bit(codes):
    codes[-1, -2] ^= 0x80


def scale(values):
    values *= 1.01


def swap_two_gates(content):
    """An ONNX file whose operator has its weights in another order."""
    file = onnx.load_from_string(content)
    gates = {node.output[0] for node in file.graph.node if node.op_type == "Slice"}
    order = next(node for node in file.graph.node if node.op_type == "Concat" and gates.issuperset(node.input))
    order.input[0], order.input[1] = order.input[1], order.input[0]
    return file.SerializeToString()


def test_the_layer_is_compared_and_a_wrong_file_is_found():
    model = model_of(prepared(Recurrent(nn.LSTM, batch_first=True)))
    ((bits, content),) = export_onnx(model, (8,))
    right = verdicts(model, content, bits)
    assert all(verdict.passed for verdict in right)
    assert any("recurrent" in verdict.layers for verdict in right)
    wrong = {
        "a code": changed(content, "recurrent.weight_hh_l0.codes", flip_a_bit),
        "a bias": changed(content, "recurrent.bias_hh_l0", scale),
        "gates": swap_two_gates(content),
    }
    for what, file in wrong.items():
        found = verdicts(model, file, bits)
        assert not any(verdict.passed for verdict in found), what
        assert "recurrent" in found[0].problems[0], what
    assert "(19, 3)" in verdicts(model, wrong["a code"], bits)[0].problems[0]


def test_it_is_exact_in_both_formats_and_a_wrong_file_of_tflite_is_found():
    network = prepared(Both())
    assert len(quantized_weights(network)) == 8
    assert_exact(network, SHAPE, WIDTHS)
    model = model_of(network)
    ((bits, content),) = export_onnx(model, (8,))
    for name, change in (("lstm.bias_hh_l0", scale), ("gru.weight_hh_l0_reverse.codes", flip_a_bit)):
        (file,) = convert_to_tflite([onnx.load_from_string(changed(content, name, change))])
        for verdict in verdicts(model, file, bits):
            assert not verdict.passed, name


@pytest.mark.parametrize(
    ("kind", "other", "options", "batch"),
    [
        pytest.param(nn.LSTM, nn.GRU, {"bidirectional": True}, 2, id="steps first, of as many as steps"),
        pytest.param(nn.RNN, nn.LSTM, {"batch_first": True}, 5, id="of as many as states"),
        pytest.param(nn.LSTM, nn.LSTM, {"batch_first": True, "proj_size": 3}, 7, id="projected, of as many as inputs"),
    ],
)
def test_tflite_files_of_a_batch_are_exact_where_states_are_rounded(kind, other, options, batch):
    model = model_of(prepared(Rounding(kind, other, **options), std=1.0))
    states = (model.module.a.proj_size or 5) * (1 + model.module.a.bidirectional)
    models = [onnx.load_from_string(content) for _, content in export_onnx(model, WIDTHS)]
    run_time, fixed = convert_to_runtime_tflite(models, batch=batch)
    samples = np.random.default_rng(0).standard_normal((batch + 2, *SHAPE), np.float32)  # more than a batch
    for bits, content in fixed.items():
        assert truncate_file(run_time, bits) == content
        assert backend_of(content).batch(content) == batch
        for file, width in ((content, None), (run_time, bits)):
            for deployed in (True, False):
                runner = open_runner(file, width, deployed=deployed)
                found = compare(model, bits, runner.run((samples,)), samples)
                assert found.passed, found.problems
                assert found.activations == samples.size // 6 * (7 + states + 6)
    ((_, content),) = export_onnx(model, (8,))
    for name, change in (("b.weight_hh_l0.codes", flip_a_bit), ("b.bias_hh_l0", scale)):
        (file,) = convert_to_tflite([onnx.load_from_string(changed(content, name, change))], batch=batch)
        assert not compare(model, 8, run_file(file, samples), samples).passed, name


def test_tflite_refuses_more_steps_than_can_be_written_out():
    ((_, content),) = export_onnx(model_of(prepared(Recurrent(nn.GRU, batch_first=True))), (8,))
    file = onnx.load_from_string(content)
    check_convertible([file])
    file.graph.input[0].type.tensor_type.shape.dim[1].dim_value = MOST_STEPS + 1
    with pytest.raises(ConversionError, match=rf"recurrent/GRU goes through {MOST_STEPS + 1} steps"):
        check_convertible([file])


def test_projected_states_are_exact_in_both_formats_and_a_wrong_file_is_found():
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3}
    network = prepared(Rounding(nn.LSTM, nn.GRU, proj_size=3, **options), std=1.0)
    names = [weight.parameter for weight in quantized_weights(network).values() if weight.module_name == "a"]
    assert names[:3] == ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    assert len(names) == 12
    assert_exact(network, SHAPE, WIDTHS)
    model = model_of(network)
    ((bits, content),) = export_onnx(model, (8,))
    assert any("a" in verdict.layers for verdict in verdicts(model, content, bits))
    for name, change in (("a.weight_hr_l1_reverse.codes", flip_a_bit), ("a.bias_hh_l0", scale)):
        wrong = changed(content, name, change)
        (file,) = convert_to_tflite([onnx.load_from_string(wrong)])
        for verdict in (*verdicts(model, wrong, bits), *verdicts(model, file, bits)):
            assert not verdict.passed, (name, verdict.runtime)
            assert re.search(r"\ba\b", verdict.problems[0]), verdict.problems


def test_projected_states_without_biases_and_steps_first_are_exact():
    network = prepared(Rounding(nn.LSTM, nn.RNN, proj_size=2, bias=False), std=1.0)
    assert_exact(network, SHAPE, WIDTHS)
