"""verify is able to fail: each kind of damage to a real artifact is caught at every width, and named to the layer."""

from __future__ import annotations

import re

import numpy as np
import pytest
from damage import LAYER, changed_onnx, changed_tflite, flip_a_bit, index_of, onnx_value, scaled_onnx, scaled_tflite
from places import artifact

from tqexport.backends import open_runner
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)
SAMPLES = 24


def swap_channels(value):
    value[[2, 5]] = value[[5, 2]]
    return value


def onnx_batch_norm(content, other):
    for part in ("weight", "bias", "running_mean", "running_var"):
        name = f"layers.1.bn1.{part}"
        content = changed_onnx(content, name, lambda _, name=name: onnx_value(other, name))
    return content


def on_codes(change):
    return lambda content, _: changed_onnx(content, f"{LAYER}.weight.codes", change)


ONNX_DAMAGE = {
    "a wrong scale": lambda content, _: scaled_onnx(content, 1.02),
    "permuted channels": on_codes(swap_channels),
    "a transposed kernel": on_codes(lambda value: value.transpose(0, 1, 3, 2)),
    "a shift off by one": lambda content, _: changed_onnx(content, f"{LAYER}.weight.shift", lambda v: (v + 1) % 8),
    "the BatchNorm of another width": onnx_batch_norm,
    "one bit of one code": on_codes(flip_a_bit),
}


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
    "a wrong scale": lambda content, _: scaled_tflite(content, 1.02),
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
    content = harm(artifact(exported_once, kind, bits), artifact(exported_once, kind, bits % 8 + 1))
    inputs = digits_samples.inputs[:SAMPLES]
    layer = "layers.1.bn1" if damage == "the BatchNorm of another width" else LAYER
    for deployed in (False, True):
        run = open_runner(content, deployed=deployed).run((inputs,))
        found = compare(digits, bits, run, inputs)
        assert not found.passed
        assert found.activations_wrong > 0 or found.codes_wrong > 0 or not deployed
        assert found.diverged.startswith(("layers.1.conv1", "layers.1.bn1"))
        first = found.problems[0]
        assert layer in first, first
        # The index, and what stands there in both: codes, levels or values.
        assert re.search(r" at \(\d+(, \d+)*\)\D*: (level )?-?[\d.e+-]+ where PyTorch has -?[\d.e+-]+", first), first
        assert (found.codes_wrong == 1) == (damage == "one bit of one code")


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_damage_to_float_layers_is_named(digits, digits_samples, exported_once, kind):
    content = artifact(exported_once, kind, 4)
    if kind == "onnx":
        content = changed_onnx(content, "fc.bias", lambda value: np.roll(value, 1))
    else:
        flat = FlatModel(content)
        (last,) = [op for op in flat.graph.operators if flat.operator_name(op) == "FULLY_CONNECTED"]
        flat.set_constant(int(last.inputs[2]), np.roll(flat.constant(int(last.inputs[2])), 1))
        content = flat.pack()
    inputs = digits_samples.inputs[:SAMPLES]
    found = compare(digits, 4, open_runner(content, deployed=False).run((inputs,)), inputs)
    assert found.diverged == "fc to the outputs"
    assert "the outputs are off by" in found.problems[0]
    assert found.activations_wrong == found.codes_wrong == 0


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_a_scale_that_is_off_by_little_more_than_rounding_is_caught(digits, digits_samples, exported_once, kind):
    content = artifact(exported_once, kind, 8)
    content = (scaled_onnx if kind == "onnx" else scaled_tflite)(content, 1.0005)
    inputs = digits_samples.inputs[:SAMPLES]
    found = compare(digits, 8, open_runner(content, deployed=False).run((inputs,)), inputs)
    assert LAYER in found.problems[0]
