"""Cutting a width out of a file, and running one, need little."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import artifact

from tqexport.artifacts.truncate import open_artifact, truncate_file
from tqexport.backends.onnx.truncatable import truncatable_onnx
from tqexport.errors import InputError

HEAVY = {"torch", "tensorflow", "onnxscript", "onnx2tf", "onnxruntime", "ai_edge_litert.interpreter"}


def loaded(program, folder):
    """Which heavy modules a program loads in a process of its own, run in a folder."""
    code = f"import sys, pathlib, numpy\n{program}\nprint(*sorted({HEAVY} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def held(exported_once, runtime_onnx, runtime_tflite, tmp_path):
    """A folder with a file of each kind that others can be cut from."""
    fixed = ((bits, artifact(exported_once, "onnx", bits)) for bits in range(1, 9))
    (tmp_path / "net-w5.onnx").write_bytes(dict(truncatable_onnx(fixed, (5,)))[5])
    (tmp_path / "net.onnx").write_bytes(runtime_onnx)
    (tmp_path / "net.tflite").write_bytes(runtime_tflite)
    return tmp_path


def test_cutting_loads_no_framework_and_no_runtime(exported_once, held):
    names = sorted(path.name for path in held.iterdir())
    program = (
        "from tqexport.artifacts.truncate import truncate_file\n"
        f"for name in {names}: pathlib.Path('cut-' + name).write_bytes(truncate_file(pathlib.Path(name), 3))"
    )
    assert loaded(program, held).split() == []
    for name in names:
        kind = name.rpartition(".")[2]
        assert (held / f"cut-{name}").read_bytes() == artifact(exported_once, kind, 3)


@pytest.mark.parametrize(
    ("name", "shape", "runtime"),
    [("net.onnx", (1, 1, 8, 8), "onnxruntime"), ("net.tflite", (1, 8, 8, 1), "ai_edge_litert.interpreter")],
)
def test_an_application_loads_one_runtime_and_no_framework(held, name, shape, runtime):
    program = (
        "from tqexport.runtime import SwitchableModel\n"
        f"SwitchableModel({name!r}, 2).run(numpy.zeros({shape}, numpy.float32))"
    )
    assert loaded(program, held).split() == [runtime]


def test_a_file_is_opened_by_path_or_content(held):
    by_path, by_content = open_artifact(held / "net.onnx"), open_artifact((held / "net.onnx").read_bytes())
    assert (by_path.facts, by_path.widths) == (by_content.facts, by_content.widths)
    assert (by_path.name, by_content.name) == (str(held / "net.onnx"), "the file")


def test_a_result_that_is_not_the_file_of_then_is_never_handed_out(held, monkeypatch):
    backend = open_artifact(held / "net.onnx").backend
    monkeypatch.setattr(backend, "cut", lambda *_: b"something else", raising=False)
    with pytest.raises(InputError, match=r"net.onnx was changed or damaged since its export"):
        truncate_file(held / "net.onnx", 4)
