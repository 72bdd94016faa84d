"""verify is true, and able to fail: right artifacts pass at every width, each kind of damage is caught and named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tqexport.flatbuffer import FlatModel
from tqexport.parity import compare
from tqexport.runtimes import run_onnx, run_tflite
from tqexport.tflite_export import convert_to_tflite

WIDTHS = range(1, 9)


def content_of(folder, kind, bits):
    return (folder / "out" / f"ckpt-w{bits}.{kind}").read_bytes()


def verdict(digits, samples, kind, bits, content, count=64):
    run = (run_onnx if kind == "onnx" else run_tflite)(content, samples.inputs[:count])
    return compare(digits, bits, run, samples.inputs[:count], samples.labels[:count])


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_export_of_the_trained_network_passes_on_real_digits(digits, digits_samples, exported_once, kind, bits):
    found = verdict(digits, digits_samples, kind, bits, content_of(exported_once, kind, bits), 450)
    assert found.passed, found.problems
    assert found.codes == 76_288
    assert found.codes_wrong == found.activations_wrong == 0
    assert found.activations == 450 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4)
    assert found.flips < 100
    assert found.top1_agreement >= 0.99
    assert found.accuracy > (0.9 if bits == 1 else 0.97)


def changed_onnx(content, name, change):
    model = onnx.load_from_string(content)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return model.SerializeToString()


def flip_a_code(value):
    value.flat[17] ^= 0x80  # the highest bit, so that every width sees it
    return value


ONNX_DAMAGE = {
    "one code": ("layers.1.conv1.weight.codes", flip_a_code, r"layer layers.1.conv1: 1 of 9216 codes differ"),
    "the shift of a layer": ("layers.0.conv0.weight.shift", lambda v: (v + 1) % 8, r"layer layers.0.conv0: "),
    "a kernel turned over": (
        "layers.2.conv0.weight.codes",
        lambda v: np.ascontiguousarray(v.transpose(0, 1, 3, 2)),
        r"layer layers.2.conv0: ",
    ),
    "a scale": ("layers.1.conv1.weight.scale", lambda v: v * np.float32(1.02), r"activation layers.1.act1: "),
    "the last scale": ("fc.weight", lambda v: v * np.float32(1.001), r"outputs are off"),
    "a BatchNorm": ("layers.0.bn1.running_mean", lambda v: v[::-1].copy(), r"activation layers.0.act1: "),
    "a classifier's rows": ("fc.bias", lambda v: np.roll(v, 1), r"outputs are off"),
}


@pytest.mark.parametrize("damage", ONNX_DAMAGE)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_damage_to_an_onnx_file_is_caught_and_named(digits, digits_samples, exported_once, damage, bits):
    name, change, message = ONNX_DAMAGE[damage]
    content = changed_onnx(content_of(exported_once, "onnx", bits), name, change)
    found = verdict(digits, digits_samples, "onnx", bits, content)
    assert not found.passed
    assert any(__import__("re").search(message, problem) for problem in found.problems), found.problems


def changed_tflite(content, name, change):
    flat = FlatModel(content)
    index = next(i for i in range(len(flat.graph.tensors)) if flat.name(i) == name)
    value = change(flat.constant(index).copy())
    flat.tensor(index).buffer = flat.add_buffer(value.tobytes())
    return flat.pack()


def step_up(value):
    value.flat[5] += 1 if value.flat[5] < 0 else -1
    return value


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_one_changed_code_in_a_tflite_file_is_caught(digits, digits_samples, exported_once, bits):
    content = changed_tflite(content_of(exported_once, "tflite", bits), "layers.1.conv1.weight.codes", step_up)
    found = verdict(digits, digits_samples, "tflite", bits, content)
    assert found.codes_wrong == 1
    assert found.problems[0] == "layer layers.1.conv1: 1 of 9216 codes differ"


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_wrong_scale_in_a_tflite_file_is_caught(digits, digits_samples, exported_once, bits):
    flat = FlatModel(content_of(exported_once, "tflite", bits))
    codes = next(t for i, t in enumerate(flat.graph.tensors) if flat.name(i) == "layers.1.conv1.weight.codes")
    codes.quantization.scale = np.asarray(codes.quantization.scale) * np.float32(1.05)
    found = verdict(digits, digits_samples, "tflite", bits, flat.pack())
    assert not found.passed
    assert found.codes_wrong == 0
    assert "activation layers.1.act1" in found.problems[0]


@pytest.fixture(scope="module")
def dynamic(exported_once) -> dict[int, bytes]:
    files = [onnx.load(exported_once / "out" / f"ckpt-w{bits}.onnx") for bits in WIDTHS]
    return dict(zip(WIDTHS, convert_to_tflite(files, "dynamic"), strict=True))


@pytest.mark.parametrize("bits", WIDTHS)
def test_dynamic_kernels_hold_the_trained_weights_and_round_their_input(digits, digits_samples, dynamic, bits):
    run = run_tflite(dynamic[bits], digits_samples.inputs)
    found = compare(digits, bits, run, digits_samples.inputs, digits_samples.labels, "dynamic")
    assert found.passed, found.problems
    assert found.codes == 76_288
    assert found.codes_wrong == 0
    assert found.activations_wrong < 0.1 * found.activations
    assert found.accuracy > found.reference_accuracy - 0.01
    flat = FlatModel(dynamic[bits])
    filters = [flat.constant(op.inputs[1]) for op in flat.graph.operators if flat.operator_name(op) == "CONV_2D"]
    assert sum(value is not None and value.dtype == np.int8 for value in filters) == 8


@pytest.mark.parametrize("bits", [4, 6, 7, 8])  # at fewer bits the next level is a large part of the range
def test_a_wrong_scale_in_front_of_dynamic_kernels_is_caught(digits, digits_samples, dynamic, bits):
    flat = FlatModel(dynamic[bits])
    codes = next(t for i, t in enumerate(flat.graph.tensors) if flat.name(i) == "layers.1.conv1.weight.codes")
    codes.quantization.scale = np.asarray(codes.quantization.scale) * np.float32(1.3)
    inputs = digits_samples.inputs[:64]
    found = compare(digits, bits, run_tflite(flat.pack(), inputs), inputs, None, "dynamic")
    assert not found.passed


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_a_file_of_another_width_is_caught(digits, digits_samples, exported_once, kind):
    found = verdict(digits, digits_samples, kind, 4, content_of(exported_once, kind, 3))
    assert not found.passed
    assert found.codes_wrong > 0
