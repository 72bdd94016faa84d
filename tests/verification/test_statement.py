"""verify --attest: a statement of what was compared, whatever the verdict, and never one of an earlier run."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from commands import run
from damage import changed_onnx, flip_a_bit, replace_artifact
from places import DIGITS_DATA

VERIFY = ("verify", "out", "--bits", "4", "--runtime", "onnxruntime", "--attest", "made/statement.json")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_pass_and_a_fail_are_stated_and_a_refusal_leaves_none(exported):
    path = exported / "made" / "statement.json"
    assert run(*VERIFY, "--data", DIGITS_DATA, cwd=exported).returncode == 0
    statement = json.loads(path.read_bytes())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    artifact = exported / "out" / "ckpt-w4.onnx"
    assert statement["subject"] == [{"name": "ckpt-w4.onnx", "digest": {"sha256": sha256(artifact)}}]
    predicate = statement["predicate"]
    assert predicate["result"] == "PASSED"
    assert predicate["passedTests"] == ["ckpt-w4.onnx at 4 bits in onnxruntime"]
    named = {entry["name"]: entry["digest"]["sha256"] for entry in predicate["configuration"]}
    assert named["ckpt.pt"] == sha256(exported / "ckpt.pt")
    assert named["digits-test.npz"] == sha256(DIGITS_DATA)
    details = predicate["urn:tqexport:parity:v1"]
    assert details["versions"]["onnxruntime"]
    (result,) = details["results"]
    assert result["unoptimized"]["parameters"] == "equal"
    assert 0 < result["unoptimized"]["output_error"] <= result["unoptimized"]["output_bound"]
    layer = result["unoptimized"]["layers"]["layers.0.bn1"]
    assert 0 < layer["error"] <= layer["bound"]
    assert str(exported) not in path.read_text()

    codes = "layers.1.conv0.weight.codes"
    replace_artifact(exported / "out", "ckpt-w4.onnx", lambda content: changed_onnx(content, codes, flip_a_bit))
    assert run(*VERIFY, cwd=exported).returncode == 1
    statement = json.loads(path.read_bytes())
    assert statement["subject"][0]["digest"]["sha256"] == sha256(artifact)
    assert statement["predicate"]["result"] == "FAILED"
    assert statement["predicate"]["failedTests"] == ["ckpt-w4.onnx at 4 bits in onnxruntime"]
    assert "1 of 4608 values differ" in statement["predicate"]["urn:tqexport:parity:v1"]["results"][0]["problems"][0]

    artifact.write_bytes(artifact.read_bytes() + b" ")
    assert run(*VERIFY, cwd=exported).returncode == 3
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("content", [b"results", b'{"_type": "notes"}', b"[" * 100_000])
def test_a_file_that_is_no_statement_is_not_replaced(tmp_path, content):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "statement.json").write_bytes(content)
    refused = run(*VERIFY, cwd=tmp_path)
    assert refused.returncode == 2
    assert "is no statement of an earlier run" in refused.stderr
    assert (tmp_path / "made" / "statement.json").read_bytes() == content


def test_two_artifacts_have_no_checkpoint_to_attest(exported):
    pair = ("verify", "out/ckpt-w4.onnx", "out/ckpt-w4.tflite", "--attest", "statement.json")
    assert run(*pair, cwd=exported).returncode == 2


def test_what_was_cut_is_in_the_manifest_and_verified(exported, runtime_files):
    for artifact in (exported / "out").iterdir():
        if artifact.name.startswith("ckpt-w4"):
            artifact.unlink()
    manifest = exported / "out" / "tqexport.json"
    content = json.loads(manifest.read_text())
    content["artifacts"] = [entry for entry in content["artifacts"] if entry["widths"] != [4]]
    manifest.write_text(json.dumps(content))
    for name in ("ckpt.onnx", "ckpt.tflite"):
        assert run("truncate", runtime_files / name, "--bits", "3,4", "-o", "out", cwd=exported).returncode == 0
    entries = {entry["file"]: entry for entry in json.loads(manifest.read_text())["artifacts"]}
    for kind in ("onnx", "tflite"):
        entry = entries[f"ckpt-w4.{kind}"]
        assert entry["cut_from"] == {"file": f"ckpt.{kind}", "sha256": sha256(runtime_files / f"ckpt.{kind}")}
        assert entry["inputs"] == entries[f"ckpt-w5.{kind}"]["inputs"]
        assert entries[f"ckpt-w3.{kind}"]["cut_from"] == {}  # it was exported, and is the same
    done = run("verify", "out", "--bits", "4", "--runtime", "onnxruntime", cwd=exported)
    assert done.returncode == 0
    assert "*" not in done.stdout


def test_a_manifest_of_another_checkpoint_is_left_as_it_is(exported, runtime_files):
    manifest = exported / "out" / "tqexport.json"
    content = manifest.read_text().replace('"checkpoint_sha256": "', '"checkpoint_sha256": "0')
    manifest.write_text(content)
    shutil.rmtree(exported / "cut", ignore_errors=True)
    done = run("truncate", runtime_files / "ckpt.onnx", "--bits", "4", "-o", "out", cwd=exported)
    assert done.returncode == 0
    assert "not entered in out/tqexport.json, which is of another checkpoint" in done.stdout
    assert manifest.read_text() == content
    manifest.write_text("{")
    refused = run("truncate", runtime_files / "ckpt.onnx", "--bits", "5", "-o", "out", cwd=exported)
    assert refused.returncode == 3
    assert "is damaged" in refused.stderr
