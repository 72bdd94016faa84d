"""Two artifacts are compared with each other, without the checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import run
from damage import LAYER, changed_onnx, changed_tflite, flip_a_bit, scaled_onnx
from places import DIGITS_DATA


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_two_artifacts_are_compared_without_a_checkpoint(exported, bits):
    (exported / "ckpt.pt").unlink()
    first, second = f"out/ckpt-w{bits}.tflite", f"out/ckpt-w{bits}.onnx"
    done = run("verify", first, second, "--data", DIGITS_DATA, "--json", cwd=exported)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["codes"] == 76_288
    assert found["codes_wrong"] == found["activations_wrong"] == 0
    assert found["activations"] == 450 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4)
    assert 0 < found["output_error"] < found["tolerance"] < 2e-4
    assert all(side["accuracy"] > 0.9 for side in found["sides"])


DAMAGED = {
    "a code": (
        "tflite",
        lambda c: changed_tflite(c, f"{LAYER}.weight.codes", flip_a_bit),
        f"layer {LAYER}: 1 of 9216 codes",
    ),
    "a scale": ("onnx", lambda content: scaled_onnx(content, 1.02), "activation layers.1.act1: "),
    "the last layer": (
        "onnx",
        lambda content: changed_onnx(content, "fc.bias", lambda value: np.roll(value, 1)),
        "the outputs are off by",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_two_artifacts_that_differ_are_told_apart_and_the_layer_is_named(exported, case):
    kind, change, message = DAMAGED[case]
    path = exported / "out" / f"ckpt-w2.{kind}"
    path.write_bytes(change(path.read_bytes()))
    done = run("verify", "out/ckpt-w2.onnx", "out/ckpt-w2.tflite", cwd=exported)
    assert done.returncode == 1
    assert message in done.stdout
    assert "FAIL: the artifacts differ, first in " in done.stdout.splitlines()[-1]


def test_pairs_that_make_no_sense_are_refused(exported):
    for arguments, exit_code, message in (
        (["out/ckpt-w2.onnx", "out/ckpt-w4.onnx"], 2, "computes with 4 bits, so it cannot be compared at 2"),
        (["out/ckpt-w2.onnx"], 2, "name two artifacts"),
        (["out/ckpt-w2.onnx", "out/none.onnx"], 3, "none.onnx cannot be read"),
        (["out/ckpt-w2.onnx", "out/tqexport.json"], 2, "tqexport.json does not end as a file to compare"),
        (["out/ckpt-w2.onnx", "out/ckpt-w2.tflite", "--report", "r.html"], 2, "without a checkpoint"),
    ):
        done = run("verify", *arguments, cwd=exported)
        assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
        assert message in done.stderr
