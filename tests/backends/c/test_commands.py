"""``tqexport c`` from the command line, and every other command on its files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from c_programs import NO_GCC, STRICT
from commands import run
from places import DIGITS, ROOT

from tqexport.backends.c.runtime import _compiled

CALIBRATED = ROOT / "fixtures" / "digits-resnet8-int.pt"

pytestmark = pytest.mark.skipif(bool(NO_GCC), reason=NO_GCC or "never")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with ``my net.pt`` and its exports, in a folder whose name has a space too."""
    folder = tmp_path_factory.mktemp("in c") / "a place"
    folder.mkdir()
    shutil.copy(CALIBRATED, folder / "my net.pt")
    for arguments in (("c", "my net.pt", "--bits", "2,8"), ("c", "--bits", "runtime")):
        done = run(*arguments, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_three_files_lie_beside_each_other_and_the_test_program_passes(exported):
    out = exported / "tqexport-out"
    for stem, widths in (("my net-w2", 1), ("my net-w8", 1), ("my net", 8)):
        command = ["gcc", *STRICT, "-O2", f"{stem}_test.c", f"{stem}.c", "-o", "tried"]
        subprocess.run(command, cwd=out, check=True)
        said = subprocess.run([out / "tried"], capture_output=True, text=True, check=True).stdout
        assert len(re.findall(r"bits: 0 of 30 output bytes differ", said)) == widths
        (out / "tried").unlink()
    manifest = json.loads((out / "tqexport.json").read_text())
    entries = {entry["file"]: entry for entry in manifest["artifacts"]}
    assert set(entries) == {"my net-w2.c", "my net-w8.c", "my net.c"}
    assert entries["my net.c"]["companions"] == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("my net.h", "my net_test.c")
    }
    assert entries["my net.c"]["inputs"] == [{"name": "input", "dtype": "int8", "shape": [1, 8, 8, 1]}]
    assert {path.name for path in out.iterdir()} == {
        *(f"{stem}{end}" for stem in ("my net-w2", "my net-w8", "my net") for end in (".c", ".h", "_test.c")),
        "tqexport.json",
    }


def test_verify_runs_what_the_compiler_makes_of_them(exported):
    done = run("verify", "--runtime", "c", "--samples", "4", "--json", cwd=exported)
    assert done.returncode == 0, done.stdout
    checks = json.loads(done.stdout)["results"]
    assert {(check["bits"], check["artifact"]) for check in checks} == {
        (2, "my net-w2.c"),
        (8, "my net-w8.c"),
        *((bits, "my net.c") for bits in range(1, 9)),
    }
    assert all(check["passed"] and check["as_deployed"]["codes"] == 76_288 for check in checks)


def changed_copy(exported: Path, tmp_path: Path, file: str, pattern: str, replacement: str) -> Path:
    """The exports with one place of one file changed, and its hash in the manifest too."""
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / "tqexport-out" / file
    content, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.DOTALL)
    assert count == 1
    path.write_text(content)
    manifest = path.with_name("tqexport.json")
    entries = json.loads(manifest.read_text())
    for entry in entries["artifacts"]:
        if entry["file"] == file:
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(entries))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "named"),
    [
        ("my net.c", r"(codes_layers_1_conv1\[\d+\] = \{\s*)\d+", r"\g<1>7", "layers.1.conv1"),
        ("my net-w8.c", r"(biases_fc\[\d+\] = \{\s*)-?\d+", r"\g<1>7", "fc"),
        ("my net-w2.c", r"sum \+ bias|bias \+ sum", "bias - sum", "the program"),
        ("my net-w2.c", r"convolve\(&convolution_layers_0_conv1, [^;]*;", ";", "the program"),
        ("my net.c", r"^", '#include <stdlib.h>\nint run(void) { return system("touch ran"); }\n', None),
    ],
)
def test_a_changed_file_is_named_and_not_run(exported, tmp_path, file, pattern, replacement, named):
    folder = changed_copy(exported, tmp_path, file, pattern, replacement)
    done = run("verify", "--runtime", "c", "--samples", "4", "--bits", "2,8", cwd=folder)
    if named is None:  # it is no longer a file of tqexport at all
        assert done.returncode == 3, done.stdout
    else:
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"FAIL: {file}" in done.stdout
        assert f"first in {named}" in done.stdout
    assert not list(folder.rglob("ran"))


def test_a_changed_facts_line_is_not_compiled_elsewhere(exported, tmp_path):
    """A name with folders in it would be written outside of the compiler's folder."""
    folder = changed_copy(exported, tmp_path, "my net-w8.c", r'#include "my net-w8.h"', '#include "../../my net.h"')
    done = run("verify", "--runtime", "c", "--samples", "4", "--bits", "8", cwd=folder)
    assert done.returncode == 3, done.stdout
    assert "my net-w8.c" in done.stderr


@pytest.mark.parametrize("file", ["my net-w8.c", "my net.c"])
@pytest.mark.parametrize(
    ("pattern", "replacement", "named"),
    [
        (r'("class_names": \["0", )"1"', r'\g<1>"7"', "class_names"),
        (r'("mean": \[)', r"\g<1>1", "normalization"),
        (r'("checkpoint_sha256": ")', r"\g<1>0", "checkpoint_sha256"),
        (r'("layout": "channels )last', r"\g<1>first", "layout"),
    ],
)
def test_what_a_file_says_of_itself_is_compared_too(exported, tmp_path, file, pattern, replacement, named):
    folder = changed_copy(exported, tmp_path, file, pattern, replacement)
    done = run("verify", "--runtime", "c", "--samples", "2", "--bits", "8", cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert f"{named.replace('_', ' ')}: the file says " in said
    assert " where the checkpoint gives " in said


@pytest.mark.parametrize("name", ["my net-w2.h", "my net-w2_test.c"])
def test_a_file_beside_it_that_was_changed_or_is_gone_is_refused(exported, tmp_path, name):
    shutil.copytree(exported, tmp_path / "copy")
    beside = tmp_path / "copy" / "tqexport-out" / name
    beside.write_bytes(beside.read_bytes().replace(b"0", b"1", 1))
    done = run("verify", "--runtime", "c", "--bits", "2", cwd=tmp_path / "copy")
    assert (done.returncode, f"{name} is not the file that was exported" in done.stderr) == (3, True)
    beside.unlink()
    done = run("verify", "--runtime", "c", "--bits", "2", cwd=tmp_path / "copy")
    assert (done.returncode, f"{name} is in tqexport.json but not in the folder" in done.stderr) == (3, True)


@pytest.mark.parametrize("said", ["", "echo >&2", "echo no such target >&2"])
def test_a_compiler_that_fails_is_named(exported, tmp_path, monkeypatch, said):
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{said}\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    _compiled.cache_clear()
    done = run("verify", "--runtime", "c", "--samples", "2", "--bits", "2", cwd=exported)
    assert (done.returncode, "the C compiler of this machine fails: " in done.stderr) == (4, True)


def test_another_format_is_a_file_of_another_version_not_a_difference(exported, tmp_path):
    folder = changed_copy(exported, tmp_path, "my net-w8.c", r'"format": 1', '"format": 2')
    done = run("verify", "--runtime", "c", "--bits", "8", cwd=folder)
    assert (done.returncode, "another version of tqexport" in done.stderr) == (3, True)


def test_inspect_and_truncate_say_what_they_find(exported):
    said = run("inspect", "tqexport-out/my net.c", cwd=exported).stdout
    assert "1, 2, 3, 4, 5, 6, 7, 8 bits, chosen as it runs\n" in said
    assert "int8 1x8x8x1" in said
    done = run("truncate", "tqexport-out/my net.c", "--bits", "2", cwd=exported)
    assert done.returncode == 2
    assert "nothing is cut from C files; export the width: tqexport c CHECKPOINT --bits 2" in done.stderr


def test_a_checkpoint_without_grids_is_told_how_to_get_them(tmp_path):
    done = run("c", DIGITS, cwd=tmp_path)
    assert done.returncode == 3
    assert "has no grid to be an integer on; tqexport calibrate finds one" in done.stderr
    assert not list((tmp_path / "tqexport-out").iterdir())


def test_without_a_compiler_files_do_not_pass_unseen(exported, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    done = run("verify", "--samples", "2", "--bits", "2", cwd=exported)
    assert done.returncode == 4
    assert "no C compiler is installed (cc); install gcc or clang, or choose others with --runtime" in done.stderr
    done = run("verify", "--samples", "2", "--bits", "2", "--runtime", "onnxruntime", cwd=exported)
    assert done.returncode == 0, done.stdout
