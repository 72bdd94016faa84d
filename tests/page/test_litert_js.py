"""The program for LiteRT.js in Chromium gives the scores of LiteRT in Python. Needs npm, Chromium and playwright."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
from places import artifact
from programs import program

from tqexport import ReadOptions
from tqexport.artifacts.project import open_project
from tqexport.runtime import SwitchableModel

VERSION = "2.5.3"
pytestmark = [
    pytest.mark.package,
    pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed"),
]


@pytest.fixture(scope="module")
def folder(exported_once, runtime_files, tmp_path_factory):
    """The program, LiteRT.js, and files of every make that it takes."""
    folder = tmp_path_factory.mktemp("litert-js")
    packages = [f"@litertjs/{name}@{VERSION}" for name in ("core", "wasm-utils")]
    subprocess.run(["npm", "install", "--silent", *packages], cwd=folder, check=True)
    (folder / "run.html").write_text(program("html", "run.html"))
    (folder / "fixed.tflite").write_bytes(artifact(exported_once, "tflite", 2))
    (made,) = open_project(exported_once / "ckpt.pt", folder, ReadOptions()).export("tflite", [2], "dynamic")
    (folder / made.file).rename(folder / "dynamic.tflite")
    shutil.copy(runtime_files / "ckpt.tflite", folder / "all.tflite")
    return folder


def test_the_program_gives_the_scores_of_litert(folder, browser, serve):
    address, sample = serve(folder), np.full((1, 8, 8, 1), 0.5, np.float32)
    for file, bits in (
        ("fixed.tflite", None),
        ("dynamic.tflite", None),
        ("all.tflite", 1),
        ("all.tflite", 3),
        ("all.tflite", 8),
    ):
        page, wrong = browser.new_page(), []
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.goto(f"{address}/run.html?file={file}" + (f"&bits={bits}" if bits else ""))
        page.wait_for_function("document.querySelector('pre').textContent", timeout=60_000)
        expected = SwitchableModel(folder / file, bits or 2).run(sample)[0]
        assert np.allclose(json.loads(page.text_content("pre")), expected, rtol=0, atol=1e-5)
        assert wrong == []
        page.close()
