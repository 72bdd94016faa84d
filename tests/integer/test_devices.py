"""Tools of devices take the files. Each test needs a package of the extra ``devices``."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.integer.build import integer_model
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


@pytest.mark.parametrize("bits", [4, 7])
def test_openvino_is_within_a_few_levels(calibrated, held_out, tmp_path, bits):
    """It keeps sums in floats where it fuses them, so its levels are near the integer model's, not equal."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    path = Path(tmp_path / "net.onnx")
    path.write_bytes(integer_onnx(calibrated, bits, FOLDED))  # it folds no chain of codes and shift
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(str(path), "CPU", options)(held_out)[0]
    network = integer_model(calibrated, bits)
    expected = network.to_floats(network.output, network.run(held_out)[network.output])
    assert np.abs(found - expected).max() <= 8 * network.grids[network.output].scale
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99
