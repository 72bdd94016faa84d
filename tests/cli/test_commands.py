"""The commands as typed: what they write, what they print, how they exit."""

from __future__ import annotations

import json
import os
import shutil
import sys

import click
import numpy as np
import pytest
import torch
from commands import run
from damage import changed_onnx, changed_tflite, flip_a_bit, replace_artifact
from places import DIGITS, DIGITS_DATA, files
from tqexport.cli import cli, common

from tqexport.backends import BACKENDS


@pytest.fixture
def workplace(tmp_path):
    shutil.copy(DIGITS, tmp_path / "ckpt.pt")
    return tmp_path


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


@pytest.mark.parametrize(("kind", "change"), [("onnx", changed_onnx), ("tflite", changed_tflite)])
def test_one_flipped_code_turns_verify_red(exported, kind, change):
    codes = "layers.1.conv0.weight.codes"
    replace_artifact(exported / "out", f"ckpt-w4.{kind}", lambda content: change(content, codes, flip_a_bit))
    result = run("verify", "out", "--bits", "4", cwd=exported)
    assert result.returncode == 1
    assert "layer layers.1.conv0: 1 of 4608 codes differ" in result.stdout
    last = result.stdout.rstrip().splitlines()[-1]
    assert last.startswith(
        f"FAIL: ckpt-w4.{kind} at 4 bits differs from PyTorch, first in layers.1.conv0.weight.codes; "
    )
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


def test_every_command_is_in_the_help_and_has_json(tmp_path):
    text = run("--help", cwd=tmp_path).stdout
    assert {
        *BACKENDS,
        "verify",
        "evaluate",
        "truncate",
        "split",
        "join",
        "inspect",
        "check",
        "gap",
        "convert",
        "calibrate",
        "page",
    } == {*cli.commands}
    for name in cli.commands:
        assert f"\n  {name} " in text
        assert "--json" in run(name, "--help", cwd=tmp_path).stdout


def test_a_bug_does_not_look_like_a_parity_failure(tmp_path):
    @click.command()
    def broken():
        raise ZeroDivisionError("oops")

    done = run(cwd=tmp_path, entry=lambda: sys.exit(common.run_and_exit(broken)))
    assert (done.returncode, done.stdout) == (70, "")
    assert "internal error, ZeroDivisionError: oops" in done.stderr


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


def test_a_damaged_file_is_refused_before_the_others_run(exported):
    path = exported / "out" / "ckpt-w8.tflite"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    done = run("verify", "out", "--bits", "1-8", cwd=exported)
    assert (done.returncode, done.stdout) == (3, "")
    assert "ckpt-w8.tflite is not the file that was exported" in done.stderr
    assert run("verify", "out", "--bits", "1", "--samples", "2", cwd=exported).returncode == 0


def test_files_that_others_can_be_cut_from(exported):
    fixed = {path.name: path.read_bytes() for path in (exported / "out").iterdir()}
    done = run("onnx", "ckpt.pt", "--bits", "4", "--truncatable", "-o", "new", cwd=exported)
    assert done.returncode == 0, done.stderr
    assert "can be truncated to 1, 2, 3, 5, 6, 7, 8" in done.stdout
    manifest = json.loads((exported / "new" / "tqexport.json").read_text())
    assert [(e["file"], e["widths"], e["truncatable_to"]) for e in manifest["artifacts"]] == [
        ("ckpt-w4.onnx", [4], [1, 2, 3, 5, 6, 7, 8]),
    ]
    # the tables of the ONNX file must not be taken for facts of the TFLite file made from it
    assert run("tflite", "new", "--bits", "4", "-o", "plain", cwd=exported).returncode == 0
    assert (exported / "plain" / "ckpt-w4.tflite").read_bytes() == fixed["ckpt-w4.tflite"]

    before = {path.name: path.read_bytes() for path in (exported / "new").iterdir()}
    assert run("truncate", "new/ckpt-w4.onnx", cwd=exported).returncode == 0
    added = {path.name: path.read_bytes() for path in (exported / "new").iterdir() if path.name not in before}
    assert sorted(added) == [f"ckpt-w{bits}.onnx" for bits in (1, 2, 3, 5, 6, 7, 8)]
    assert all(content == fixed[name] for name, content in added.items())

    refused = run("truncate", "new/ckpt-w4.onnx", "--bits", "4", cwd=exported)
    assert (refused.returncode, "is another file already" in refused.stderr) == (2, True)
    assert (exported / "new" / "ckpt-w4.onnx").read_bytes() == before["ckpt-w4.onnx"]
    refused = run("truncate", "out/ckpt-w4.onnx", "--bits", "2", cwd=exported)
    assert (refused.returncode, "--truncatable" in refused.stderr) == (3, True)
    refused = run("onnx", "ckpt.pt", "--bits", "runtime", "--truncatable", cwd=exported)
    assert (refused.returncode, "leave --truncatable out" in refused.stderr) == (2, True)


def test_tflite_files_of_one_width_hold_no_other_and_the_refusal_says_what_to_do(exported):
    before = files(exported)
    refused = run("tflite", "out", "--bits", "4", "--truncatable", "-o", "new", cwd=exported)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--bits runtime" in refused.stderr
    assert "ONNX file made with --truncatable" in refused.stderr
    assert files(exported) == before
    assert "--truncatable" not in run("tflite", "--help", cwd=exported).stdout
