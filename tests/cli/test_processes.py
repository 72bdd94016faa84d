"""What a process of its own has to show: the first lines as typed, interrupts, missing packages, imports."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from commands import COMMAND, run_process
from pictures import write_pictures
from places import DIGITS, files


def test_the_three_lines_as_typed(tmp_path):
    workplace = tmp_path
    shutil.copy(DIGITS, workplace / "ckpt.pt")
    before = (workplace / "ckpt.pt").read_bytes()
    first = run_process("onnx", "ckpt.pt", "--bits", "8", cwd=workplace)
    assert (first.returncode, first.stderr) == (0, "")
    second = run_process("tflite", cwd=workplace)
    assert (second.returncode, second.stderr) == (0, "")
    assert "channels last" in second.stdout
    third = run_process("verify", "--bits", "2,4,6", cwd=workplace)
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


@pytest.mark.parametrize("free", [1_000_000, 10_000])  # less than what onnx2tf wants to find, and than the network
def test_a_full_disk_in_the_converter_is_said_and_leaves_nothing(exported, free):
    before = files(exported)
    done = subprocess.run(
        [COMMAND, "tflite", "ckpt.pt", "--bits", "8", "-o", "out"],
        cwd=exported,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (free, free)),
    )
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert files(exported) == before


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


INTERRUPTED = {
    "while an object is destroyed": """
class Destroyed:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
Destroyed()
""",
    "in a function that compiled code calls": """
ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGTERM))()
""",
    "while a file is written": """
with atomic_path(Path("file")) as path:
    path.write_text("half")
    signal.raise_signal(signal.SIGTERM)
""",
    "while a folder is removed": """
remove = shutil.rmtree
def interrupted(path, **options):
    shutil.rmtree = remove
    signal.raise_signal(signal.SIGTERM)
shutil.rmtree = interrupted
with temporary_folder() as folder:
    (folder / "file").touch()
""",
    "while another process writes into a folder": """
with temporary_folder() as folder:
    program = f"import pathlib, os\\nwhile True: pathlib.Path({str(folder)!r}, os.urandom(4).hex()).touch()"
    subprocess.Popen([sys.executable, "-c", program])
    while not any(folder.iterdir()):
        time.sleep(0.01)
    signal.raise_signal(signal.SIGTERM)
""",
    "while another process starts others": """
last = "import time; open('begun', 'w').close(); time.sleep(60)"
program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {last!r}])"
subprocess.Popen([sys.executable, "-c", program])
while not Path("begun").exists():
    time.sleep(0.01)
Path("begun").unlink()
signal.raise_signal(signal.SIGTERM)
""",
    "while a runtime is kept from saying too much": """
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
signal.raise_signal(signal.SIGTERM)
""",
    "while it prints": """
class Interrupted:
    def __str__(self):
        signal.raise_signal(signal.SIGTERM)
        return ""
print(Interrupted())
""",
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_an_interrupt_ends_a_command_at_once_and_leaves_nothing(tmp_path, case):
    code = f"""
import ctypes, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import click
from tqexport.cli.common import run_and_exit
from tqexport.files import atomic_path, temporary_folder

@click.command()
def command():
{textwrap.indent(INTERRUPTED[case], "    ")}
    time.sleep(60)

sys.exit(run_and_exit(command))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=tmp_path, env=environment
    )
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (143, "", "interrupted")
    assert [path.name for path in tmp_path.iterdir()] == []
    working = (entry.readlink() for entry in Path("/proc").glob("[0-9]*/cwd") if os.access(entry, os.R_OK))
    assert tmp_path not in working


def test_help_does_not_wait_for_the_heavy_imports():
    heavy = ("torch", "tensorflow", "onnx", "onnxruntime", "onnx2tf", "numpy", "rich")
    code = f"import sys, tqexport.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def run_without(module, *arguments, cwd):
    """The command where a module cannot be imported."""
    hide = cwd / "hide"
    hide.mkdir(exist_ok=True)
    (hide / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None\n")
    return run_process(*arguments, cwd=cwd, env={**os.environ, "PYTHONPATH": str(hide)})


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("onnxruntime", ["out", "--bits", "2"], "pip install 'tqexport[onnx]'"),
        ("ai_edge_litert", ["out", "--bits", "2"], "pip install 'tqexport[litert]'"),
        ("tensorflow", ["ckpt.pt", "--bits", "2"], "pip install 'tqexport[tflite]'"),
        ("matplotlib", ["out", "--bits", "2", "--report", "r.html"], "pip install 'tqexport[report]'"),
        ("jinja2", ["out", "--bits", "2", "--report", "r.html"], "pip install 'tqexport[report]'"),
        ("PIL", ["out", "--bits", "2", "--data", "pictures"], "pip install 'tqexport[report]'"),
    ],
)
def test_what_is_missing_is_named_with_what_to_install(exported, module, arguments, message):
    write_pictures(exported / "pictures", 3)
    done = run_without(module, "verify", *arguments, cwd=exported)
    assert done.returncode == 4, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (exported / "r.html").exists()
