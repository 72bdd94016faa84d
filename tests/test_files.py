"""Files whole or not at all; what a killed run leaves, the next one removes, and nothing else."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import DIGITS, DIGITS_INT, ROOT

from tqexport import load_checkpoint, save_checkpoint
from tqexport.artifacts.manifest import read_manifest
from tqexport.artifacts.project import open_project
from tqexport.checkpoints import checkpoint
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import HostError, InputError, UsageError
from tqexport.evaluation.subjects import subjects_of
from tqexport.files import (
    atomic_path,
    ensure_folder,
    remove_temporary,
    temporary_files_in,
    temporary_folder,
    write_bytes,
    write_folder,
)

LEAVE = (
    "import os, pathlib, sys, tqexport.files as files\n"
    "with files.atomic_path(pathlib.Path('net.onnx')) as a, files.temporary_folder() as b:\n"
    "    a.write_bytes(b'half'); (b / 'part').write_bytes(b'half'); print(a.name, b.name, flush=True); os._exit(9)\n"
)


def test_what_a_killed_run_leaves_the_next_one_removes_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LEAVE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 9
    left = done.stdout.split()
    assert len(left) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)
    others = (".net.onnx.tmp", ".0123abcd.tmp", "tqexport.tmp", ".0123abcd.tqexport.tmp~")
    folders = ("tqexport-out", "tqexport.tmp.mine", "tqexport.tmp.12345678.old")
    for name in others:
        (tmp_path / name).write_text("somebody's")
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("somebody's")
    (tmp_path / "target").mkdir()
    (tmp_path / "tqexport.tmp.abcdefgh").symlink_to(tmp_path / "target")
    with atomic_path(tmp_path / "x") as file, temporary_folder() as folder:  # of a run that lives
        file.write_text("x")
        ensure_folder(tmp_path)
        with temporary_folder() as another:
            assert {file, folder, another} <= {*tmp_path.iterdir()}
    assert (tmp_path / "x").read_text() == "x"
    now = sorted(path.name for path in tmp_path.iterdir())
    assert now == sorted([*others, *folders, "target", "tqexport.tmp.abcdefgh", "x"])


@pytest.mark.parametrize("variable", [None, "/somewhere"])
def test_temporary_files_of_libraries_and_of_processes_go_with_the_folder(tmp_path, monkeypatch, variable):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TMPDIR", raising=False)
    if variable:
        monkeypatch.setenv("TMPDIR", variable)
    program = "import tempfile; print(tempfile.gettempdir())"
    with temporary_files_in(tmp_path):
        theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert tempfile.gettempdir() == theirs.strip() == str(tmp_path)
    assert tempfile.tempdir is None
    assert os.environ.get("TMPDIR") == variable


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "net.onnx").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(HostError, match=r"cannot write .*net.onnx: File too large"):
            write_bytes(tmp_path / "net.onnx", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.onnx", "old")]


def test_two_exports_into_one_folder_lose_nothing_of_each_other(exported, tmp_path):
    both = [open_project(exported / "ckpt.pt", tmp_path / "out", ReadOptions()) for _ in range(2)]
    for project, bits in zip(both, (2, 7), strict=True):
        list(project.export("onnx", (bits,)))
    assert [artifact.widths for artifact in read_manifest(tmp_path / "out").artifacts] == [(2,), (7,)]
    other = open_project(DIGITS, tmp_path / "new", ReadOptions())
    mine = open_project(exported / "ckpt.pt", tmp_path / "new", ReadOptions())
    list(other.export("onnx", (2,)))
    before = (tmp_path / "new" / "tqexport.json").read_bytes()
    with pytest.raises(UsageError, match=r"holds exports of .*digits-resnet8.pt; choose another folder"):
        list(mine.export("onnx", (2,)))
    assert (tmp_path / "new" / "tqexport.json").read_bytes() == before


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(DIGITS.read_bytes())
    read = checkpoint.read_tensor_file

    def read_and_replace(path):
        content = read(path)
        path.write_bytes(DIGITS_INT.read_bytes())
        return content

    monkeypatch.setattr(checkpoint, "read_tensor_file", read_and_replace)
    with pytest.raises(InputError, match="changed while it was read; run this again"):
        load_checkpoint(path)


def test_a_checkpoint_that_is_replaced_before_it_is_delivered_to_workers_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(DIGITS.read_bytes())
    project = open_project(path, tmp_path / "out", ReadOptions())
    subjects, delivery = subjects_of(project, (4,), ("pytorch",))
    assert delivery.files[subjects[0].sha256] == DIGITS.read_bytes()
    path.write_bytes(DIGITS_INT.read_bytes())
    with pytest.raises(InputError, match="was changed while this command ran; run it again"):
        subjects_of(project, (4,), ("pytorch",))


def test_artifacts_are_the_very_bytes_whose_hash_was_looked_at(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(DIGITS.read_bytes())
    (artifact,) = open_project(path, tmp_path / "out", ReadOptions()).export("onnx", (4,))
    file = tmp_path / "out" / artifact.file
    content = file.read_bytes()
    project = open_project(tmp_path / "out", None, ReadOptions())
    artifacts = project.artifacts((4,))
    assert next(artifacts) == (artifact, content)
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match="is not the file that was exported"):
        list(project.artifacts((4,)))
    file.unlink()
    with pytest.raises(InputError, match="not in the folder; export it again"):
        list(project.artifacts((4,)))


def test_commands_that_are_ended_leave_nothing_half_written():
    """A few trials; ``make interruption`` makes as many as wanted, of every command."""
    arguments = ["--trials", "8", "--commands", "convert safetensors"]
    program = [sys.executable, str(ROOT / "tests" / "interruption" / "run.py"), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 trials, 0 wrong" in done.stdout


def test_a_process_under_other_circumstances_gives_the_same_bytes(digits, tmp_path):
    """Two threads, another hash seed, another folder, no vectors; ``make repeatability`` exports in every format."""
    save_checkpoint(tmp_path / "net.safetensors", digits.module, digits.info)
    project = open_project(tmp_path / "net.safetensors", tmp_path / "here", ReadOptions())
    (artifact,) = project.export("onnx", (4,))
    folder = tmp_path / "a folder" / "of another name"
    folder.mkdir(parents=True)
    program = (
        "import pathlib, sys, tqexport, tqexport.artifacts.project as project\n"
        "path = pathlib.Path('net.safetensors'); path.write_bytes(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "opened = project.open_project(path, pathlib.Path('out'), tqexport.ReadOptions())\n"
        "list(opened.export('onnx', (4,)))\n"
        "tqexport.save_checkpoint('again.safetensors', opened.model.module, opened.model.info)\n"
    )
    circumstances = {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5", "ATEN_CPU_CAPABILITY": "default"}
    line = [sys.executable, "-c", program, str(tmp_path / "net.safetensors")]
    subprocess.run(line, cwd=folder, env={**os.environ, **circumstances}, check=True, capture_output=True)
    assert (folder / "out" / artifact.file).read_bytes() == (tmp_path / "here" / artifact.file).read_bytes()
    assert (folder / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_a_folder_that_another_process_still_writes_to_is_removed(monkeypatch):
    """It writes on for a moment, as a converter does that was told to end while it started."""
    remove, calls = shutil.rmtree, []

    def remove_and_be_late(path, **options):
        remove(path, **options)
        calls.append(path)
        if len(calls) < 3:
            path.mkdir()
            (path / "late").touch()

    monkeypatch.setattr(shutil, "rmtree", remove_and_be_late)
    with temporary_folder() as folder:
        (folder / "early").touch()
    assert calls == [folder] * 3
    assert not folder.exists()


def test_a_page_that_is_about_to_be_replaced_is_put_back_by_an_interrupt(tmp_path, monkeypatch):
    page = tmp_path / "page"
    write_folder(page, {"first": b"1"})
    rename = Path.rename

    def interrupted(path, target):
        if target == page:  # the other one lies aside, and nothing is in its place
            monkeypatch.setattr(Path, "rename", rename)
            remove_temporary()
            raise OSError("the process has ended")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(HostError):
        write_folder(page, {"second": b"2"})
    assert {path.name: path.read_bytes() for path in page.iterdir()} == {"first": b"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    write_folder(page, {"second": b"2"})
    assert {path.name: path.read_bytes() for path in page.iterdir()} == {"second": b"2"}
