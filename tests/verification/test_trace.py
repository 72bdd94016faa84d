"""Modules that are called several times, or on constants: right files pass, and what is wrong in them is found."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
import torch
from damage import changed_onnx, changed_tflite, flip_a_bit
from exactness import verdicts
from networks import model_of, randomize_, samples_for
from torch import nn

from tqexport import prepare
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.verification.trace import _Candidates, count_calls

WIDTHS = (2, 8)


class Shared(nn.Module):
    """One convolution is called twice, and one BatchNorm and one activation three times."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 3, 1)
        self.norm, self.act = nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.act(self.norm(self.conv(x)))
        x = self.act(self.norm(self.conv(x)))
        return self.last(x).mean((2, 3))


@functools.cache
def shared():
    """The network, and its files by kind and width."""
    model = model_of(randomize_(prepare(Shared(), WIDTHS), 6), (2, 8, 7), WIDTHS)
    files = dict(export_onnx(model, WIDTHS))
    converted = convert_to_tflite([onnx.load_from_string(content) for content in files.values()])
    return model, {"onnx": files, "tflite": dict(zip(WIDTHS, converted, strict=True))}


def test_the_modules_are_called_several_times():
    model, _ = shared()
    with torch.no_grad():
        _, calls = count_calls(model.module, [torch.from_numpy(samples_for(model, 2))])
    assert (calls["conv"], calls["norm"], calls["act"]) == (2, 3, 3)


def test_a_value_without_a_name_is_taken_for_the_layer_that_it_is_nearest_to():
    generator = np.random.default_rng(0)
    one, other = generator.standard_normal((2, 3, 4, 5)).astype(np.float32)
    candidates = _Candidates({"one": one, "other": other})
    anything, nothing = np.full_like(one, 100), np.zeros_like(one)
    assert np.array_equal(candidates.like(other * np.float32(1 + 1e-6), anything), other)
    assert candidates.like(other * np.float32(1 + 1e-6), nothing) is None
    assert candidates.like(one + other, anything) is None  # the bound explains anything, and these are two layers


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_right_files_pass_as_deployed_and_layer_by_layer(kind, bits):
    model, files = shared()
    for found in verdicts(model, files[kind][bits], bits):
        assert found.passed, found.problems
        assert found.activations == 3 * 3 * 6 * 6 * 5  # samples, calls, channels, and 6 by 5 places
        assert found.codes >= 324


def changed_bias(content, kind):
    """Another bias in the shared convolution, into which TFLite files have folded the BatchNorm."""
    if kind == "onnx":
        return changed_onnx(content, "conv.bias", lambda value: value + np.float32(0.05))
    flat = FlatModel(content)
    filters = {int(op.outputs[0]) for op in flat.graph.operators if flat.operator_name(op) == "DEQUANTIZE"}
    biases = {int(op.inputs[2]) for op in flat.graph.operators if filters & set(map(int, op.inputs[1:2]))}
    for index in biases:
        flat.set_constant(index, flat.constant(index) + np.float32(0.05))
    return flat.pack()


def changed_code(content, kind):
    return (changed_onnx if kind == "onnx" else changed_tflite)(content, "conv.weight.codes", flip_a_bit)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["onnx", "tflite"])
@pytest.mark.parametrize("change", [changed_bias, changed_code])
def test_damage_to_a_shared_layer_is_found(kind, bits, change):
    model, files = shared()
    content = change(files[kind][bits], kind)
    assert content != files[kind][bits]
    for found in verdicts(model, content, bits):
        assert not found.passed
        assert (found.codes_wrong > 0) == (change is changed_code)
        assert found.activations_wrong > 0 or change is changed_code


class Distances(nn.Module):
    """A value for each place, which layers compute from a table of distances, as in Swin Transformer V2."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.act = nn.Linear(9, 9), nn.Linear(9, 4), nn.ReLU()
        self.near, self.far = nn.Linear(2, 30), nn.Linear(30, 1, bias=False)
        self.register_buffer("table", torch.linspace(-1.3, 1.7, 18).reshape(9, 2).tanh())

    def forward(self, x):
        return self.last(self.first(x) + self.far(self.act(self.near(self.table))).transpose(0, 1))


@functools.cache
def distances():
    """The network, and its ONNX files by width."""
    model = model_of(randomize_(prepare(Distances(), WIDTHS, float_layers=["first", "last"]), 3), (9,), WIDTHS)
    return model, dict(export_onnx(model, WIDTHS))


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_layers_make_of_a_constant_is_rounded_and_its_damage_is_found(bits):
    model, files = distances()
    for verdict in verdicts(model, files[bits], bits):
        assert verdict.passed, verdict.problems
    for name in ("near.bias", "table", "last.bias"):
        content = changed_onnx(files[bits], name, lambda value: value + np.float32(0.01))
        for verdict in verdicts(model, content, bits):
            assert not verdict.passed, name


def test_a_layer_of_a_constant_keeps_its_codes_in_tflite():
    model, files = distances()
    contents = convert_to_tflite([onnx.load_from_string(files[bits]) for bits in WIDTHS])
    constants = [value.numpy().ravel() for value in (model.module.table, model.module.near.bias.detach())]
    for bits, content in zip(WIDTHS, contents, strict=True):
        for verdict in verdicts(model, content, bits):
            assert verdict.passed, verdict.problems
            assert verdict.codes == 90
        damaged = [changed_tflite(content, f"{name}.weight.codes", flip_a_bit) for name in ("near", "far")]
        damaged += [with_more(content, constant) for constant in constants]
        for changed in damaged:
            assert not any(verdict.passed for verdict in verdicts(model, changed, bits))


class FirstState(nn.Module):
    """Layers work on the first state of a sequence, which is the same for all samples."""

    def __init__(self):
        super().__init__()
        self.first, self.near, self.far, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.act, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        state = self.far(self.act(self.near(x.new_zeros(x.shape[0], 6))))
        return self.last(self.act2(self.first(x) + state))


@functools.cache
def first_state():
    """The network, and its ONNX files by width."""
    model = model_of(randomize_(prepare(FirstState(), WIDTHS), 4), (6,), WIDTHS)
    return model, dict(export_onnx(model, WIDTHS))


@pytest.mark.parametrize("network", [distances, first_state])
@pytest.mark.parametrize("batch", [0, 2])  # 0: ONNX
def test_what_is_the_same_for_all_samples_passes_with_more_of_them_than_a_runtime_takes_at_once(network, batch):
    model, files = network()
    if batch:
        contents = convert_to_tflite([onnx.load_from_string(files[bits]) for bits in WIDTHS], batch=batch)
        files = dict(zip(WIDTHS, contents, strict=True))
    for bits, content in files.items():
        for verdict in verdicts(model, content, bits, samples=130):
            assert verdict.passed, verdict.problems
            assert verdict.activations >= 270


def with_more(content, constant):
    """A TFLite file in which 0.01 is added to a constant of its."""
    flat = FlatModel(content)
    values = {index: flat.constant(index) for index in range(len(flat.graph.tensors))}
    same = [i for i, value in values.items() if value is not None and np.array_equal(value.ravel(), constant)]
    assert same
    for index in same:
        flat.set_constant(index, values[index] + np.float32(0.01))
    return flat.pack()
