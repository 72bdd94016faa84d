"""The JSON documents are what docs/schemas promises; additions are allowed, and everything promised is there."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from commands import run
from places import DATA, DIGITS_DATA, ROOT
from tqexport.cli import cli
from web_copy import web_copy

SCHEMAS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "docs" / "schemas").iterdir()}
SAMPLES = 32
CALLS = {  # by command: its calls, and the schema of what each prints
    "onnx": [("onnx ckpt.pt --bits 2 -o new", "export")],
    "tflite": [("tflite ckpt-int.pt --bits 2 -o new-tflite", "export")],
    "c": [("c ckpt-int.pt --bits 2 -o new-c", "export")],
    "verify": [
        ("verify out --bits 2 --runtime onnxruntime --data few.npz", "verify"),
        ("verify out/ckpt-w2.onnx out/ckpt-w2.tflite --samples 2", "verify-artifacts"),
    ],
    "evaluate": [("evaluate out --bits 2,8 --data few.npz --workers 1 --resume journal", "evaluate")],
    "truncate": [(f"truncate {DATA}/v0.1/svhnq.onnx --bits 2 -o new", "truncate")],
    "split": [(f"split {DATA}/v0.1/svhnq.onnx --first 2 -o new-parts", "split")],
    "join": [("join parts/svhnq-w2-exact-packed.onnx parts/svhnq-w2-rest.zip -o whole", "join")],
    "inspect": [("inspect ckpt.pt", "inspect"), ("inspect out/ckpt-w2.onnx", "inspect-artifact")],
    "gap": [("gap ckpt.pt --bits 2", "gap"), ("gap ckpt.pt --bits 2 --data few.npz", "gap")],
    "convert": [("convert ckpt.pt new.pt", "convert")],
    "check": [("check resnet8 --input-shape 3,8,8 --bits 2,8", "check")],
    "page": [("page ckpt-int.pt --data few.npz --onnxruntime-web web -o new-page", "page")],
    "calibrate": [("calibrate ckpt.pt --data few.npz", "calibrate")],
}


@pytest.fixture(scope="module")
def folder(exported_once, tmp_path_factory, calibrated):
    from shutil import copytree

    from tqexport import save_checkpoint

    workplace = copytree(exported_once, tmp_path_factory.mktemp("schemas") / "work")
    with np.load(DIGITS_DATA) as data:
        np.savez(workplace / "few.npz", inputs=data["inputs"][:SAMPLES], labels=data["labels"][:SAMPLES])
    web_copy(workplace / "web")
    save_checkpoint(workplace / "ckpt-int.pt", calibrated.module, calibrated.info)
    assert run("split", str(DATA / "v0.1" / "svhnq.onnx"), "-o", "parts", cwd=workplace).returncode == 0
    return workplace


def check(document, schema):
    jsonschema.Draft202012Validator(SCHEMAS[schema]).validate(document)


def test_every_command_has_a_schema_and_every_schema_is_one():
    assert [name for name in cli.commands if name not in CALLS] == []
    used = {schema for calls in CALLS.values() for _, schema in calls} | {"manifest", "error"}
    assert used == {*SCHEMAS}
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(("line", "schema"), [call for calls in CALLS.values() for call in calls])
def test_what_a_command_prints_is_what_its_schema_says(folder, line, schema):
    if schema == "calibrate":
        (folder / "ckpt-int.pt").unlink(missing_ok=True)
    done = run(*line.split(), "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    check(document, schema)
    for promised in SCHEMAS[schema]["required"]:  # the schema is no empty promise
        with pytest.raises(jsonschema.ValidationError):
            check({key: value for key, value in document.items() if key != promised}, schema)


@pytest.mark.parametrize("arguments", [["onnx", "nothing.pt"], ["onnx", "ckpt.pt", "--bits", "9"]])
def test_a_refusal_is_what_its_schema_says(folder, arguments):
    done = run(*arguments, "--json", cwd=folder)
    document = json.loads(done.stdout)
    check(document, "error")
    assert document["exit_code"] == done.returncode
    assert document["error"] in done.stderr


@pytest.mark.parametrize("version", ["v0.1", "v0.1-truncatable"])
def test_manifests_of_earlier_versions_are_what_the_schema_says(version):
    check(json.loads((DATA / version / "tqexport.json").read_text()), "manifest")


def test_the_manifest_is_what_its_schema_says(exported_once):
    check(json.loads((exported_once / "out" / "tqexport.json").read_text()), "manifest")
