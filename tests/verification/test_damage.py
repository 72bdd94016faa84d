"""verify is able to fail: each kind of damage to a real artifact is caught at every width, and named to the layer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tqexport.backends import open_runner
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)
LAYER = "layers.1.conv1"
SAMPLES = 24


def content_of(folder, kind, bits):
    return (folder / "out" / f"ckpt-w{bits}.{kind}").read_bytes()


def swap_channels(value):
    value[[2, 5]] = value[[5, 2]]
    return value


def flip_a_bit(value):
    value.view(np.uint8).reshape(-1)[17] ^= 0x80  # the highest, so that every width sees it
    return value


def onnx_value(content, name):
    model = onnx.load_from_string(content)
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def changed_onnx(content, name, change):
    model = onnx.load_from_string(content)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy()))
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return model.SerializeToString()


def onnx_batch_norm(content, other):
    for part in ("weight", "bias", "running_mean", "running_var"):
        name = f"layers.1.bn1.{part}"
        content = changed_onnx(content, name, lambda _, name=name: onnx_value(other, name))
    return content


def on_codes(change):
    return lambda content, _: changed_onnx(content, f"{LAYER}.weight.codes", change)


ONNX_DAMAGE = {
    "a wrong scale": lambda content, _: changed_onnx(content, f"{LAYER}.weight.scale", lambda v: v * np.float32(1.02)),
    "permuted channels": on_codes(swap_channels),
    "a transposed kernel": on_codes(lambda value: value.transpose(0, 1, 3, 2)),
    "a shift off by one": lambda content, _: changed_onnx(content, f"{LAYER}.weight.shift", lambda v: (v + 1) % 8),
    "the BatchNorm of another width": onnx_batch_norm,
    "one bit of one code": on_codes(flip_a_bit),
}


def index_of(flat, name):
    return next(i for i in range(len(flat.graph.tensors)) if flat.name(i) == name)


def changed_tflite(content, name, change):
    flat = FlatModel(content)
    index = index_of(flat, name)
    flat.set_constant(index, np.ascontiguousarray(change(flat.constant(index).copy())))
    return flat.pack()


def tflite_scale(content, other):
    flat = FlatModel(content)
    quantization = flat.tensor(index_of(flat, f"{LAYER}.weight.codes")).quantization
    quantization.scale = np.asarray(quantization.scale) * np.float32(1.02)
    return flat.pack()


def bias_of(flat):
    """Tensor of the bias of LAYER, into which the converter has folded its BatchNorm."""
    codes = index_of(flat, f"{LAYER}.weight.codes")
    (dequantize,) = flat.consumers(codes)
    (convolution,) = flat.consumers(int(dequantize.outputs[0]))
    return int(convolution.inputs[2])


def tflite_batch_norm(content, other):
    flat, source = FlatModel(content), FlatModel(other)
    flat.set_constant(bias_of(flat), source.constant(bias_of(source)).copy())
    return flat.pack()


def on_integers(change):
    return lambda content, _: changed_tflite(content, f"{LAYER}.weight.codes", change)


TFLITE_DAMAGE = {
    "a wrong scale": tflite_scale,
    "permuted channels": on_integers(swap_channels),
    "a transposed kernel": on_integers(lambda value: value.transpose(0, 2, 1, 3)),
    "a shift off by one": on_integers(lambda value: value >> 1),
    "the BatchNorm of another width": tflite_batch_norm,
    "one bit of one code": on_integers(flip_a_bit),
}
CASES = [("onnx", damage) for damage in ONNX_DAMAGE] + [("tflite", damage) for damage in TFLITE_DAMAGE]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("kind", "damage"), CASES, ids=[f"{kind}: {damage}" for kind, damage in CASES])
def test_damage_is_caught_at_every_width_and_named(digits, digits_samples, exported_once, kind, damage, bits):
    harm = (ONNX_DAMAGE if kind == "onnx" else TFLITE_DAMAGE)[damage]
    content = harm(content_of(exported_once, kind, bits), content_of(exported_once, kind, bits % 8 + 1))
    inputs = digits_samples.inputs[:SAMPLES]
    layer = "layers.1.bn1" if damage == "the BatchNorm of another width" else LAYER
    for deployed in (False, True):
        run = open_runner(content, deployed=deployed).run(inputs)
        found = compare(digits, bits, run, inputs)
        assert not found.passed
        assert found.activations_wrong > 0 or found.codes_wrong > 0 or not deployed
        assert found.diverged
        first = found.problems[0]
        assert layer in first, first
        assert "first at (" in first or " at (" in first  # the index, and then both values
        assert "where PyTorch has" in first
    if damage == "one bit of one code":
        assert found.codes_wrong == 1


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_damage_to_float_layers_is_named(digits, digits_samples, exported_once, kind):
    content = content_of(exported_once, kind, 4)
    if kind == "onnx":
        content = changed_onnx(content, "fc.bias", lambda value: np.roll(value, 1))
    else:
        flat = FlatModel(content)
        (last,) = [op for op in flat.graph.operators if flat.operator_name(op) == "FULLY_CONNECTED"]
        flat.set_constant(int(last.inputs[2]), np.roll(flat.constant(int(last.inputs[2])), 1))
        content = flat.pack()
    inputs = digits_samples.inputs[:SAMPLES]
    found = compare(digits, 4, open_runner(content, deployed=False).run(inputs), inputs)
    assert found.diverged == "fc to the outputs"
    assert "the outputs are off by" in found.problems[0]
    assert found.activations_wrong == found.codes_wrong == 0


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_a_scale_that_is_off_by_little_more_than_rounding_is_caught(digits, digits_samples, exported_once, kind):
    content = content_of(exported_once, kind, 8)
    if kind == "onnx":
        content = changed_onnx(content, f"{LAYER}.weight.scale", lambda value: value * np.float32(1.0005))
    else:
        flat = FlatModel(content)
        quantization = flat.tensor(index_of(flat, f"{LAYER}.weight.codes")).quantization
        quantization.scale = np.asarray(quantization.scale) * np.float32(1.0005)
        content = flat.pack()
    inputs = digits_samples.inputs[:SAMPLES]
    found = compare(digits, 8, open_runner(content, deployed=False).run(inputs), inputs)
    assert LAYER in found.problems[0]
