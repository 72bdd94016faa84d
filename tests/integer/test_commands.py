"""What grids cost is said as it is, and tqexport calibrate writes what it says."""

from __future__ import annotations

import importlib.util
import json

import pytest
from commands import run
from places import DIGITS, DIGITS_DATA

from tqexport import load_checkpoint
from tqexport.integer.price import price_of_grids


def test_the_price_of_nothing_is_nothing(digits, digits_samples):
    for price in price_of_grids(digits, digits, digits_samples.inputs[:50], digits_samples.labels[:50], (2, 8)):
        assert price.before == price.after
        assert (price.agreement, price.error) == (1, 0)


def test_calibrate_writes_a_checkpoint_and_says_what_it_costs(tmp_path):
    done = run("calibrate", DIGITS, "--data", DIGITS_DATA, "-o", "ckpt-int.pt", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["grids"] == list(load_checkpoint(tmp_path / "ckpt-int.pt").info.grids)
    assert [price["bits"] for price in document["widths"]] == list(range(1, 9))
    assert all(price["after"] >= price["before"] - 0.02 for price in document["widths"])


@pytest.fixture(scope="module")
def calibrated_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    assert run("calibrate", DIGITS, "--data", DIGITS_DATA, "-o", "net-int.pt", cwd=folder).returncode == 0
    return folder


def test_a_calibrated_checkpoint_goes_through_every_command(calibrated_file):
    def good(*arguments):
        done = run(*arguments, cwd=calibrated_file)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "net-int-w4-integer.onnx" in good("onnx", "net-int.pt", "--bits", "4,8")
    assert "net-int-integer.onnx" in good("onnx", "net-int.pt", "--bits", "runtime")
    assert "net-int-w8-integer.tflite" in good("tflite")
    assert "net-int-w4-integer-folded.onnx" in good("onnx", "net-int.pt", "--kernel", "integer-folded", "--bits", "4")
    assert "net-int-w4-integer-float-io.tflite" in good("tflite", "--kernel", "integer-float-io", "--bits", "4")
    assert "net-int-w8-integer-batch3.tflite" in good("tflite", "--batch", "3")
    said = json.loads(good("verify", "--bits", "2,4,8", "--samples", "8", "--json"))
    runtimes = {(check["bits"], check["runtime"]) for check in said["results"]}
    assert {(4, "onnxruntime integer"), (4, "onnxruntime integer switched"), (8, "LiteRT XNNPACK integer")} <= runtimes
    assert (8, "LiteRT XNNPACK integer batch 3") in runtimes
    assert {(2, "LiteRT integer"), (2, "onnxruntime integer switched"), (8, "onnxruntime integer")} <= runtimes
    assert (8, "onnxruntime integer switched") not in runtimes  # which is another graph
    assert "net-int-w2-integer.onnx" in good(
        "truncate", "tqexport-out/net-int-integer.onnx", "--bits", "2", "-o", "cut"
    )
    assert "ONNX" in good("inspect", "cut/net-int-w2-integer.onnx")
    assert "PASS" in good("verify", "tqexport-out", "--bits", "4", "--samples", "2", "--report", "report.html")


def test_symmetric_grids_go_to_symmetric_files(tmp_path):
    done = run("calibrate", DIGITS, "--data", DIGITS_DATA, "-o", "net.pt", "--symmetric", "--json", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["symmetric"]) == (0, True)
    kernel = ("--kernel", "integer-symmetric")
    assert run("onnx", "net.pt", "--bits", "1,7", *kernel, cwd=tmp_path).returncode == 0
    done = run("verify", "--bits", "1,7", "--runtime", "onnxruntime", "--samples", "4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {check["artifact"] for check in json.loads(done.stdout)["results"]}
    assert files >= {"net-w1-integer-symmetric.onnx", "net-w7-integer-symmetric.onnx"}
    assert "integer-symmetric" in run("inspect", "tqexport-out/net-w1-integer-symmetric.onnx", cwd=tmp_path).stdout
    for bits, code, words in (("8", 3, "at most 7 bits"), ("runtime", 2, "holds the codes")):
        done = run("onnx", "net.pt", "--bits", bits, *kernel, "-o", "refused", cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_a_runtime_is_chosen_or_said_to_be_absent(calibrated_file, monkeypatch, tmp_path):
    assert run("onnx", "net-int.pt", "--bits", "4", "-o", "some", cwd=calibrated_file).returncode == 0

    def verified(*runtimes):
        options = [part for runtime in runtimes for part in ("--runtime", runtime)]
        done = run("verify", "some", "--samples", "2", "--json", *options, cwd=calibrated_file)
        names = [check["runtime"] for check in json.loads(done.stdout).get("results", ())]
        return done.returncode, names, done.stderr

    assert verified("onnxruntime")[:2] == (0, ["onnxruntime integer"])
    assert verified("xnnpack", "onnxruntime")[1] == ["onnxruntime integer", "LiteRT XNNPACK integer"]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tflite_micro" else find_spec(name))
    code, names, said = verified()
    assert (code, "TFLite Micro integer" in names) == (0, False)
    assert "not compared in TFLite Micro: TFLite Micro is not installed" in said
    code, _, said = verified("tflm")
    assert (code, "TFLite Micro is not installed: pip install" in said) == (4, True)
    monkeypatch.undo()
    done = run("verify", DIGITS, "--runtime", "tflm", "--bits", "4", cwd=tmp_path)
    assert (done.returncode, "none of the files to compare runs in tflm" in done.stderr) == (2, True)


def test_what_makes_no_sense_with_integers_is_refused(calibrated_file):
    no_grid = "input has no grid to be an integer on; tqexport calibrate"
    for arguments, code, words in (
        (
            ("onnx", DIGITS, "--kernel", "integer", "-o", "a"),
            3,
            no_grid,
        ),
        (("onnx", "net-int.pt", "--kernel", "exact", "-o", "b"), 2, "was calibrated"),
        (("tflite", "net-int.pt", "--bits", "runtime", "-o", "c"), 2, "cannot hold several widths"),
        (("calibrate", "net-int.pt", "--data", DIGITS_DATA, "-o", "net-int.pt"), 2, "is the checkpoint itself"),
    ):
        done = run(*arguments, cwd=calibrated_file)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
