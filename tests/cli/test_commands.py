"""The commands as typed: what they write, what they print, how they exit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import DIGITS, DIGITS_DATA
from onnx import numpy_helper

COMMAND = Path(sys.executable).with_name("tqexport")


def run(*arguments, cwd, **kwargs):
    return subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs
    )


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def workplace(tmp_path):
    shutil.copy(DIGITS, tmp_path / "ckpt.pt")
    return tmp_path


def test_the_three_lines_as_typed(workplace):
    before = (workplace / "ckpt.pt").read_bytes()
    first = run("onnx", "ckpt.pt", "--bits", "8", cwd=workplace)
    assert (first.returncode, first.stderr) == (0, "")
    second = run("tflite", cwd=workplace)
    assert (second.returncode, second.stderr) == (0, "")
    assert "channels last" in second.stdout
    third = run("verify", "--bits", "2,4,6", cwd=workplace)
    assert (third.returncode, third.stderr) == (0, "")
    assert third.stdout.rstrip().endswith("PASS: every artifact equals PyTorch")
    assert all(f"{bits}*" in third.stdout for bits in (2, 4, 6))
    assert files(workplace) == [
        "ckpt.pt", "tqexport-out/ckpt-w8.onnx", "tqexport-out/ckpt-w8.tflite", "tqexport-out/tqexport.json",
    ]  # fmt: skip
    assert (workplace / "ckpt.pt").read_bytes() == before
    manifest = json.loads((workplace / "tqexport-out" / "tqexport.json").read_text())
    assert manifest["checkpoint"] == "../ckpt.pt"
    assert [artifact["file"] for artifact in manifest["artifacts"]] == ["ckpt-w8.onnx", "ckpt-w8.tflite"]
    assert manifest["artifacts"][1]["inputs"][0]["shape"] == [1, 8, 8, 1]
    assert str(workplace) not in json.dumps(manifest)


def test_json_is_all_there_is_on_standard_output(workplace):
    exported = run("onnx", "ckpt.pt", "--bits", "1-3", "-o", "my exports", "--json", cwd=workplace)
    document = json.loads(exported.stdout)
    assert [artifact["widths"] for artifact in document["artifacts"]] == [[1], [2], [3]]
    assert document["folder"] == "my exports"
    converted = run("tflite", "my exports", "--bits", "2", "--json", cwd=workplace)
    assert [artifact["file"] for artifact in json.loads(converted.stdout)["artifacts"]] == ["ckpt-w2.tflite"]
    checked = run("verify", "my exports", "--bits", "2", "--data", DIGITS_DATA, "--json", cwd=workplace)
    document = json.loads(checked.stdout)
    assert checked.returncode == 0
    assert document["passed"] is True
    assert [result["temporary"] for result in document["results"]] == [False, False]
    for result in document["results"]:
        for way in ("as_deployed", "unoptimized"):
            assert result[way]["accuracy"] > 0.97
            low, high = result[way]["accuracy_interval"]
            assert low < result[way]["accuracy"] < high
        assert result["unoptimized"]["layers"]["layers.0.bn1"]["error"] < 1e-5
        assert result["latency_ms"] > 0
    refused = run("onnx", "nothing.pt", "--json", cwd=workplace)
    assert json.loads(refused.stdout)["exit_code"] == refused.returncode == 3


def test_a_later_export_adds_to_the_folder_and_a_new_checkpoint_starts_it_anew(workplace):
    run("onnx", "ckpt.pt", "--bits", "8", cwd=workplace)
    run("onnx", "ckpt.pt", "--bits", "2", cwd=workplace)
    manifest = workplace / "tqexport-out" / "tqexport.json"
    assert [entry["widths"] for entry in json.loads(manifest.read_text())["artifacts"]] == [[2], [8]]

    content = torch.load(workplace / "ckpt.pt", weights_only=True)
    content["state_dict"]["fc.bias"] += 1
    torch.save(content, workplace / "ckpt.pt")
    stale = run("verify", cwd=workplace)
    assert stale.returncode == 3
    assert "ckpt.pt has changed since tqexport-out was exported" in stale.stderr
    again = run("onnx", "ckpt.pt", "--bits", "4", cwd=workplace)
    assert again.returncode == 0
    assert "exports of an earlier ckpt.pt" in again.stderr
    assert [entry["widths"] for entry in json.loads(manifest.read_text())["artifacts"]] == [[4]]

    shutil.copy(DIGITS, workplace / "other.pt")
    other = run("onnx", "other.pt", cwd=workplace)
    assert other.returncode == 2
    assert "holds exports of ../ckpt.pt; choose another folder" in other.stderr


def damage(exported, kind, change):
    """Change an artifact and enter its new hash, as a build that went wrong would."""
    path = exported / "out" / f"ckpt-w4.{kind}"
    path.write_bytes(change(path.read_bytes()))
    manifest = exported / "out" / "tqexport.json"
    content = json.loads(manifest.read_text())
    for entry in content["artifacts"]:
        if entry["file"] == path.name:
            import hashlib

            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


def flip_onnx_code(content):
    model = onnx.load_from_string(content)
    tensor = next(t for t in model.graph.initializer if t.name == "layers.1.conv0.weight.codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes[0, 0, 0, 0] ^= 0x10
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    return model.SerializeToString()


def flip_tflite_code(content):
    from test_damage import changed_tflite, flip_a_bit

    return changed_tflite(content, "layers.1.conv0.weight.codes", flip_a_bit)


@pytest.mark.parametrize(("kind", "change"), [("onnx", flip_onnx_code), ("tflite", flip_tflite_code)])
def test_one_flipped_code_turns_verify_red(exported, kind, change):
    damage(exported, kind, change)
    result = run("verify", "out", "--bits", "4", cwd=exported)
    assert result.returncode == 1
    assert "layer layers.1.conv0: 1 of 4608 codes differ" in result.stdout
    last = result.stdout.rstrip().splitlines()[-1]
    assert last.startswith(f"FAIL: ckpt-w4.{kind} at 4 bits differs from PyTorch, first in layers.1.conv0; ")
    assert "--json" in last
    assert "--report" in last


def test_a_changed_artifact_is_refused_before_anything_runs(exported):
    path = exported / "out" / "ckpt-w4.tflite"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = run("verify", "out", "--bits", "4", cwd=exported)
    assert result.returncode == 3
    assert "ckpt-w4.tflite is not the file that was exported" in result.stderr


def without_width_3(path):
    content = torch.load(DIGITS, weights_only=True)
    content["state_dict"] = {key: v for key, v in content["state_dict"].items() if ".bn_dict.3." not in key}
    content["widths"] = [1, 2, 4, 5, 6, 7, 8]
    content["arguments"]["widths"] = content["widths"]
    torch.save(content, path)


def truncated(path):
    path.write_bytes(DIGITS.read_bytes()[:100_000])


REFUSED = {
    "no such file": (["onnx", "nothing.pt"], None, 3, "nothing.pt does not exist"),
    "width 0": (["onnx", "ckpt.pt", "--bits", "0"], None, 2, "widths from 1 to 8"),
    "width 9": (["onnx", "ckpt.pt", "--bits", "9"], None, 2, "widths from 1 to 8"),
    "widths backwards": (["onnx", "ckpt.pt", "--bits", "8-1"], None, 2, "widths from 1 to 8"),
    "words for widths": (["verify", "--bits", "many"], None, 2, "widths from 1 to 8"),
    "a width without BatchNorm": (["onnx", "new.pt", "--bits", "2,3"], without_width_3, 3, "no 3-bit BatchNorm"),
    "a truncated file": (["onnx", "new.pt"], truncated, 3, "new.pt is not a PyTorch checkpoint, or it is truncated"),
    "an empty file": (["onnx", "new.pt"], lambda path: path.write_bytes(b""), 3, "new.pt is empty"),
    "no export folder": (["tflite"], None, 3, "tqexport-out does not exist"),
    "a folder without exports": (["verify", "."], None, 3, "holds no tqexport.json"),
    "a folder that is a file": (
        ["onnx", "ckpt.pt", "-o", "ckpt.pt/out"],
        None,
        4,
        "cannot write to the folder",
    ),
    "no such samples": (["verify", "ckpt.pt", "--data", "no.npz"], None, 3, "no.npz does not exist"),
    "samples that are none": (["verify", "ckpt.pt", "--data", "ckpt.pt"], None, 3, "ckpt.pt"),
    "an unknown option": (["onnx", "ckpt.pt", "--speed"], None, 2, "No such option"),
    "an unknown factory": (["onnx", "ckpt.pt", "--model", "nowhere:net"], None, 2, "cannot import"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_sentence_with_an_exit_code_and_leave_nothing(workplace, case):
    arguments, prepare, exit_code, message = REFUSED[case]
    if prepare:
        prepare(workplace / "new.pt")
    before = files(workplace)
    result = run(*arguments, cwd=workplace)
    assert result.returncode == exit_code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.startswith("tqexport:")]) <= 1
    assert files(workplace) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(workplace):
    (workplace / "locked").mkdir(mode=0o500)
    result = run("onnx", "ckpt.pt", "-o", "locked", cwd=workplace)
    assert result.returncode == 4
    assert "cannot write to the folder locked" in result.stderr


def test_samples_that_do_not_fit(workplace):
    np.savez(workplace / "wrong.npz", inputs=np.zeros((3, 1, 9, 9), np.float32))
    result = run("verify", "ckpt.pt", "--data", "wrong.npz", cwd=workplace)
    assert result.returncode == 3
    assert "wrong.npz: inputs are (3, 1, 9, 9), the network takes (N, 1, 8, 8)" in result.stderr


def test_names_with_spaces(tmp_path):
    shutil.copy(DIGITS, tmp_path / "my best net.pth.tar")
    assert run("onnx", "my best net.pth.tar", "--bits", "2", "-o", "out put", cwd=tmp_path).returncode == 0
    assert run("tflite", "out put", cwd=tmp_path).returncode == 0
    assert files(tmp_path / "out put") == ["my best net-w2.onnx", "my best net-w2.tflite", "tqexport.json"]


@pytest.mark.parametrize("seconds", [0.7, 5])
def test_an_interrupt_leaves_nothing_half_written(exported, seconds):
    shutil.rmtree(exported / "out")
    process = subprocess.Popen(
        [COMMAND, "tflite", "ckpt.pt", "--bits", "all", "-o", "out"],
        cwd=exported,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert [name for name in files(exported) if name.endswith(".tmp")] == []


def test_help_does_not_wait_for_the_heavy_imports():
    heavy = ("torch", "tensorflow", "onnx", "onnxruntime", "onnx2tf", "numpy", "rich")
    code = f"import sys, tqexport.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_command_is_in_the_help_and_has_json(tmp_path):
    text = run("--help", cwd=tmp_path).stdout
    for name in ("onnx", "tflite", "verify", "truncate", "inspect", "convert"):
        assert f"\n  {name} " in text
        assert "--json" in run(name, "--help", cwd=tmp_path).stdout


def test_a_bug_does_not_look_like_a_parity_failure(monkeypatch, capsys):
    import click
    from tqexport.cli import common

    @click.command()
    def broken():
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(sys, "argv", ["tqexport"])
    assert common.run_and_exit(broken) == 70
    assert "internal error, ZeroDivisionError: oops" in capsys.readouterr().err


def test_dynamic_kernels_stand_beside_the_exact_file(exported):
    converted = run("tflite", "out", "--bits", "4", "--kernel", "dynamic", cwd=exported)
    assert converted.returncode == 0, converted.stderr
    manifest = json.loads((exported / "out" / "tqexport.json").read_text())
    entries = {(e["file"], e["kernel"]) for e in manifest["artifacts"] if (e["kind"], e["widths"]) == ("tflite", [4])}
    assert entries == {("ckpt-w4.tflite", "exact"), ("ckpt-w4-dynamic.tflite", "dynamic")}
    checked = json.loads(run("verify", "out", "--bits", "4", "--json", cwd=exported).stdout)
    assert [result["runtime"] for result in checked["results"]] == ["onnxruntime", "LiteRT", "LiteRT dynamic"]
    assert checked["passed"]


def test_one_file_for_every_width_and_back(exported):
    fixed = {path.name: path.read_bytes() for path in (exported / "out").iterdir()}
    shutil.rmtree(exported / "out")
    assert run("onnx", "ckpt.pt", "--bits", "runtime", "-o", "out", cwd=exported).returncode == 0
    assert run("tflite", "out", "--bits", "runtime", cwd=exported).returncode == 0
    assert files(exported / "out") == ["ckpt.onnx", "ckpt.tflite", "tqexport.json"]
    manifest = json.loads((exported / "out" / "tqexport.json").read_text())
    assert [entry["widths"] for entry in manifest["artifacts"]] == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    assert [tensor["name"] for tensor in manifest["artifacts"][0]["inputs"]] == ["input", "bits"]
    checked = run("verify", "out", "--bits", "1,4,8", cwd=exported)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("switched") == 6

    assert run("truncate", "out/ckpt.onnx", "--bits", "4", cwd=exported).returncode == 0
    assert run("truncate", "out/ckpt.tflite", "--bits", "1,8", "-o", "cut", cwd=exported).returncode == 0
    assert (exported / "out" / "ckpt-w4.onnx").read_bytes() == fixed["ckpt-w4.onnx"]
    for bits in (1, 8):
        assert (exported / "cut" / f"ckpt-w{bits}.tflite").read_bytes() == fixed[f"ckpt-w{bits}.tflite"]
    refused = run("truncate", "out/ckpt-w4.onnx", "--bits", "2", cwd=exported)
    assert refused.returncode == 3
    assert "holds one width only (4 bits)" in refused.stderr
    assert run("verify", "out", "--bits", "runtime", cwd=exported).returncode == 2
