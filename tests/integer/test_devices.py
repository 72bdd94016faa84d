"""Tools of devices take the files. Each test needs a package of the extra ``devices``."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tqexport.backends.onnx.integer_form import LEVELS, integer_onnx
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.integer.build import integer_model
from tqexport.integer.model import Add, Average
from tqexport.integer.names import FOLDED


@pytest.mark.parametrize("bits", [2, 8])
def test_vela_puts_every_operator_on_the_npu(calibrated, tmp_path, bits):
    pytest.importorskip("ethosu", reason="ethos-u-vela is not installed")
    (tmp_path / "net.tflite").write_bytes(integer_tflite(calibrated, bits))
    command = [sys.executable, "-m", "ethosu.vela", "net.tflite", "--output-dir", ".", "--verbose-performance"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "CPU operators = 0 (0.0%)" in done.stdout
    with next(tmp_path.glob("*per-layer.csv")).open() as stream:
        assert {row["Target"].strip() for row in csv.DictReader(stream)} == {"NPU"}


def in_openvino(content, folder):
    """A file in OpenVINO on the CPU, ready to be called."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    path = Path(folder / "net.onnx")
    path.write_bytes(content)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(str(path), "CPU", options)


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_openvino_computes_each_layer_by_itself_as_the_integer_model_does(calibrated, held_out, tmp_path, bits):
    """Given the same levels: convolutions and linear layers to the last bit, sums and means within one level."""
    network = integer_model(calibrated, bits)
    file = onnx.shape_inference.infer_shapes(onnx.load_from_string(integer_onnx(calibrated, bits, FOLDED)))
    extractor, values = onnx.utils.Extractor(file), network.run(held_out)
    for operation in network.operations:
        part = extractor.extract_model([name + LEVELS for name in operation.inputs], [operation.output + LEVELS])
        found = in_openvino(part.SerializeToString(), tmp_path)([values[name] for name in operation.inputs])[0]
        distance = np.abs(found.astype(int) - values[operation.output])
        assert distance.max() <= isinstance(operation, (Add, Average)), operation.name


@pytest.mark.parametrize("bits", [4, 7])
def test_openvino_is_within_a_few_levels(calibrated, held_out, tmp_path, bits):
    """A layer fused with the sum behind it is not rounded in between, so levels are near the integer model's."""
    found = in_openvino(integer_onnx(calibrated, bits, FOLDED), tmp_path)(held_out)[0]
    network = integer_model(calibrated, bits)
    expected = network.to_floats(network.output, network.run(held_out)[network.output])
    assert np.abs(found - expected).max() <= 8 * network.grids[network.output].scale
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99
