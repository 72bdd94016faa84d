"""Files come out byte for byte as they did, and those of earlier versions still verify and truncate."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from test_cli import run

from tqexport import ReadOptions
from tqexport.artifacts.project import open_project
from tqexport.artifacts.truncate import open_artifact, truncate_file

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden.json").read_text())
WIDTHS = (1, 2, 4, 8)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def svhnq(tmp_path_factory):
    """Every kind of file of the research network, in folders named as in golden.json."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copy(DATA / "svhnq.pt", folder)

    def project(name):
        return open_project(folder / "svhnq.pt", folder / name, ReadOptions())

    plain = project("svhnq")
    list(plain.export("onnx", WIDTHS))
    plain.export_runtime("onnx")
    for kernel in ("exact", "dynamic"):
        list(plain.export("tflite", WIDTHS, kernel))
    plain.export_runtime("tflite")
    project("svhnq-dynamic").export_runtime("tflite", "dynamic")
    list(project("svhnq-truncatable").export("onnx", (8,), truncatable=True))
    return folder


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("svhnq")])
def test_files_of_a_research_network_keep_their_bytes(svhnq, name):
    assert sha256((svhnq / name).read_bytes()) == GOLDEN[name]


@pytest.mark.parametrize("bits", range(1, 9))
def test_files_of_the_trained_network_keep_their_bytes(exported_once, bits):
    """The fixture's own name is ckpt here; a name is not in the files."""
    for kind in ("onnx", "tflite"):
        content = (exported_once / "out" / f"ckpt-w{bits}.{kind}").read_bytes()
        assert sha256(content) == GOLDEN[f"digits/digits-w{bits}.{kind}"]


@pytest.mark.parametrize("folder", ["v0.1", "v0.1-truncatable"])
def test_folders_of_version_0_1_verify(tmp_path, folder):
    shutil.copytree(DATA, tmp_path / "data")
    done = run("verify", f"data/{folder}", "--samples", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["v0.1/svhnq.onnx", "v0.1/svhnq.tflite", "v0.1-truncatable/svhnq-w8.onnx"])
def test_files_of_version_0_1_truncate_to_the_files_of_then(name):
    held = open_artifact(DATA / name)
    assert held.widths == WIDTHS
    for bits in WIDTHS:
        kind = name.rpartition(".")[2]
        assert sha256(truncate_file(DATA / name, bits)) == GOLDEN[f"svhnq/svhnq-w{bits}.{kind}"]
