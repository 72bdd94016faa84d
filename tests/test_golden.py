"""Files come out byte for byte as they did, and those of earlier versions still verify and truncate."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from commands import run
from places import DATA, DIGITS, made_once

from tqexport import ReadOptions
from tqexport.artifacts.project import open_project
from tqexport.artifacts.truncate import open_artifact, truncate_file
from tqexport.backends import BACKENDS, run_file

GOLDEN = json.loads((DATA / "golden.json").read_text())
WIDTHS = (1, 2, 4, 8)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every kind of file of a research network and of the trained one, in folders named as in golden.json."""

    def make(folder):
        for checkpoint, name, widths in ((DATA / "svhnq.pt", "svhnq", WIDTHS), (DIGITS, "digits", range(1, 9))):
            shutil.copy(checkpoint, folder / f"{name}.pt")

            def project(kind, name=name):
                return open_project(folder / f"{name}.pt", folder / f"{name}{kind}", ReadOptions())

            plain = project("")
            for backend in ("onnx", "tflite"):
                list(plain.export(backend, widths))
                plain.export_runtime(backend)
            list(plain.export("tflite", widths, "dynamic"))
            project("-dynamic").export_runtime("tflite", "dynamic")
            list(project("-truncatable").export("onnx", (8,), truncatable=True))

    return made_once(tmp_path_factory, "golden", make)


@pytest.mark.parametrize("name", GOLDEN)
def test_files_keep_their_bytes(made, name):
    assert sha256((made / name).read_bytes()) == GOLDEN[name]


def test_every_kind_of_file_has_a_hash(made):
    assert {str(path.relative_to(made)) for suffix in BACKENDS for path in made.rglob(f"*.{suffix}")} == set(GOLDEN)


@pytest.mark.parametrize("folder", ["v0.1", "v0.1-truncatable"])
def test_folders_of_version_0_1_verify(tmp_path, folder):
    shutil.copytree(DATA, tmp_path / "data")
    done = run("verify", f"data/{folder}", "--samples", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["v0.1/svhnq.onnx", "v0.1/svhnq.tflite", "v0.1-truncatable/svhnq-w8.onnx"])
def test_files_of_version_0_1_truncate_to_the_files_of_then(name):
    """The hashes of then are in the files, and those of the ONNX files are today's."""
    held = open_artifact(DATA / name)
    assert held.widths == WIDTHS
    kind = name.rpartition(".")[2]
    for bits in WIDTHS:
        cut = truncate_file(DATA / name, bits)
        assert sha256(cut) == held.facts.digests[bits]
        if kind == "onnx":
            assert sha256(cut) == GOLDEN[f"svhnq/svhnq-w{bits}.onnx"]
        elif bits in (4, 8):
            assert cut == (DATA / "v0.1" / f"svhnq-w{bits}.tflite").read_bytes()


def test_tflite_files_that_version_0_1_made_truncatable_are_fixed_files_now(tmp_path):
    name = "svhnq-w4.tflite"
    shutil.copy(DATA / "v0.1-truncatable" / name, tmp_path)
    held, fixed = open_artifact(tmp_path / name), open_artifact(DATA / "v0.1" / name)
    assert (held.widths, held.own, held.holds_several) == ((4,), 4, False)
    assert held.facts == fixed.facts
    x = np.random.default_rng(0).random((2, 3, 40, 40), np.float32)
    assert np.array_equal(run_file(held.content, x).output, run_file(fixed.content, x).output)
    refused = run("truncate", name, "--bits", "2", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert f"{name} holds one width only (4 bits)" in refused.stderr
    assert "--bits runtime" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]
