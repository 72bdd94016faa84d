"""verify is true: right artifacts pass at every width, in both runtimes, and what rounding explains is little."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from damage import scaled_tflite
from places import artifact

from tqexport.backends import open_runner, run_file
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.verification.classes import wilson_interval
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)


def verdict(digits, samples, kind, bits, content, count=64):
    run = run_file(content, samples.inputs[:count])
    return compare(digits, bits, run, samples.inputs[:count], samples.labels[:count])


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_export_of_the_trained_network_passes_on_real_digits(digits, digits_samples, exported_once, kind, bits):
    found = verdict(digits, digits_samples, kind, bits, artifact(exported_once, kind, bits), 450)
    assert found.passed, found.problems
    assert found.codes == 76_288
    assert found.codes_wrong == found.activations_wrong == 0
    assert found.activations == 450 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4)
    assert found.flips < 100
    assert found.top1_agreement >= 0.99
    assert found.accuracy > (0.9 if bits == 1 else 0.97)


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_without_optimisations_every_layer_is_compared(digits, digits_samples, exported_once, kind, bits):
    inputs = digits_samples.inputs[:64]
    run = open_runner(artifact(exported_once, kind, bits), deployed=False).run((inputs,))
    found = compare(digits, bits, run, inputs)
    assert found.passed, found.problems
    layers = {"layers.0.bn0", "layers.1.bn0", "layers.1.bn1", "layers.2.bn1"}
    if kind == "onnx":
        layers |= {f"layers.{block}.conv{conv}" for block in range(3) for conv in (0, 1)} | {"conv", "bn"}
    assert layers <= set(found.layers)
    assert all(0 < layer.bound < 4e-5 for layer in found.layers.values())
    assert all(layer.error < layer.bound / 2 for layer in found.layers.values())
    assert found.worst_layer[1] == max(layer.error for layer in found.layers.values()) > 0
    assert found.flip_bound < 1e-3


@pytest.fixture(scope="module")
def dynamic(exported_once) -> dict[int, bytes]:
    files = [onnx.load(exported_once / "out" / f"ckpt-w{bits}.onnx") for bits in WIDTHS]
    return dict(zip(WIDTHS, convert_to_tflite(files, "dynamic"), strict=True))


@pytest.mark.parametrize("bits", WIDTHS)
def test_dynamic_kernels_hold_the_trained_weights_and_round_their_input(digits, digits_samples, dynamic, bits):
    run = run_file(dynamic[bits], digits_samples.inputs)
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
    inputs = digits_samples.inputs[:64]
    found = compare(digits, bits, run_file(scaled_tflite(dynamic[bits], 1.3), inputs), inputs, None, "dynamic")
    assert not found.passed


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_a_file_of_another_width_is_caught(digits, digits_samples, exported_once, kind):
    found = verdict(digits, digits_samples, kind, 4, artifact(exported_once, kind, 3))
    assert not found.passed
    assert found.codes_wrong > 0


def test_wilson_intervals_hold_the_share_and_shrink():
    assert wilson_interval(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)  # published: 72.2 % for 10 of 10
    assert wilson_interval(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    low, high = wilson_interval(0.5, 10_000)
    assert 0.49 < low < 0.5 < high < 0.51
