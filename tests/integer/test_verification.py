"""Verification passes what the library writes and fails what somebody changed; calibrate writes what it says."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import DIGITS, DIGITS_DATA
from tqexport.cli import cli

from tqexport import load_checkpoint
from tqexport.integer.onnx_form import integer_onnx
from tqexport.integer.price import price_of_grids
from tqexport.integer.tflite_form import integer_tflite
from tqexport.integer.verification import verify_integer_onnx, verify_integer_tflite
from tqexport.tflite.flatbuffer import FlatModel


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_onnx_files_pass(calibrated, held_out, bits, folded):
    verdict = verify_integer_onnx(calibrated, bits, integer_onnx(calibrated, bits, folded=folded), held_out)
    assert verdict.passed
    assert verdict.layers_compared == 14
    assert verdict.agreement == 1
    assert verdict.flips[0] < 0.05 * verdict.flips[1]


@pytest.mark.parametrize("rounding", ["xnnpack", "litert", "tflm"])
@pytest.mark.parametrize("bits", [3, 8])
def test_tflite_files_pass(calibrated, held_out, bits, rounding):
    if rounding == "tflm":
        pytest.importorskip("tflite_micro", reason="tflite-micro is not installed")
    verdict = verify_integer_tflite(calibrated, bits, integer_tflite(calibrated, bits), held_out[:30], rounding)
    assert verdict.passed
    assert verdict.layers_compared == (14 if rounding == "litert" else 0)


def test_a_changed_code_fails_by_name(calibrated, held_out):
    model = onnx.load_from_string(integer_onnx(calibrated, 4))
    (codes,) = (tensor for tensor in model.graph.initializer if tensor.name == "layers.1.conv0.weight.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 0x80]) + codes.raw_data[1:]
    verdict = verify_integer_onnx(calibrated, 4, model.SerializeToString(), held_out)
    assert not verdict.passed
    assert verdict.codes == ("layers.1.conv0.weight.codes",)
    assert [layer.name for layer in verdict.layers] == ["layers.1.act0"]


def test_a_changed_filter_fails_by_name(calibrated, held_out):
    flat = FlatModel(integer_tflite(calibrated, 4))
    (index,) = (i for i in range(len(flat.graph.tensors)) if flat.name(i) == "layers.1.conv0.weight")
    weight = flat.constant(index).copy()
    weight.flat[0] = -weight.flat[0]
    flat.set_constant(index, weight)
    verdict = verify_integer_tflite(calibrated, 4, flat.pack(), held_out[:30], "litert")
    assert verdict.codes == ("layers.1.conv0",)
    assert [layer.name for layer in verdict.layers] == ["layers.1.act0"]


def test_another_bias_fails_where_it_is(calibrated, held_out):
    model = onnx.load_from_string(integer_onnx(calibrated, 4))
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "layers.2.conv1.bias_integers")
    bias.raw_data = (np.frombuffer(bias.raw_data, np.int32) + 500).tobytes()
    verdict = verify_integer_onnx(calibrated, 4, model.SerializeToString(), held_out)
    assert verdict.codes == ()
    assert [layer.name for layer in verdict.layers] == ["layers.2.bn1"]


def test_the_price_of_nothing_is_nothing(digits, digits_samples):
    for price in price_of_grids(digits, digits, digits_samples.inputs[:50], digits_samples.labels[:50], (2, 8)):
        assert price.before == price.after
        assert (price.agreement, price.error) == (1, 0)


def test_calibrate_writes_a_checkpoint_and_says_what_it_costs(tmp_path):
    target = tmp_path / "ckpt-int.pt"
    arguments = ["calibrate", str(DIGITS), "--data", str(DIGITS_DATA), "-o", str(target), "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["grids"] == list(load_checkpoint(target).info.grids)
    assert [price["bits"] for price in document["widths"]] == list(range(1, 9))
    assert all(price["after"] >= price["before"] - 0.02 for price in document["widths"])
