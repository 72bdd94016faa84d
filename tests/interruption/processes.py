"""Commands in processes of their own, forked from one that has imported what commands import."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqexport.cli import main as tqexport
from warm_converter import convert_and_end

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "tempfile.mkdtemp", "fcntl.flock")


def start(folder: Path, line: str, setup: Callable[[], object] = lambda: None, log: str = "said") -> int:
    """Start a command in a process of its own; returns its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        descriptor = os.open(folder.parent / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["tqexport", *line.split()]
        setup()
        tqexport()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def run(folder: Path, line: str, *, counting: Path | None = None) -> int:
    """Run a command undisturbed; returns its exit code."""
    return end_of(start(folder, line, (lambda: count_operations(counting)) if counting else lambda: None))


def end_of(process: int) -> int:
    """The exit code of a process, once it has ended; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def said(folder: Path, log: str = "said") -> str:
    """What a command printed."""
    return (folder.parent / log).read_text(errors="replace")


def forked_worker(folder: Path, pairs: Sequence[str]) -> tuple[int, str]:
    """What :func:`tqexport.backends.tflite.onnx2tf.run_worker` does, in a process that is forked: it has no imports."""
    lifeline, held = os.pipe()  # never written to; it ends with this process
    printed, printing = os.pipe()
    process = os.fork()
    if not process:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        kept = {0, 1, 2, lifeline, printing}
        for descriptor in {int(entry.name) for entry in Path("/proc/self/fd").iterdir()} - kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)  # neither locks nor pipes are inherited by a program that is started
        convert_and_end(folder, pairs, lifeline, printing)
    os.close(lifeline)
    os.close(printing)
    with os.fdopen(printed, errors="replace") as stream:
        words = stream.read()
    code = end_of(process)
    os.close(held)
    return code, words


def count_operations(target: Path) -> None:
    """Count this process's operations on files in the folder of the trial, and keep the number in a file."""
    number, process = 0, os.getpid()
    folder = str(Path.cwd())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if os.getpid() == process and is_operation(event, arguments, folder):
            number += 1
            descriptor = os.dup(counter)
            os.pwrite(descriptor, f"{number:9}".encode(), 0)
            os.close(descriptor)

    counter = os.open(target, os.O_RDWR | os.O_CREAT)
    sys.addaudithook(hook)


def end_before_operation(number: int, by: signal.Signals) -> None:
    """Send this process a signal right before its operation on files of that number."""
    left, process = number, os.getpid()
    folder = str(Path.cwd())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if os.getpid() == process and is_operation(event, arguments, folder):
            left -= 1
            if left == 0:
                os.kill(process, by)

    sys.addaudithook(hook)


def is_operation(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an event of Python's audit is an operation on a file of the trial."""
    if event not in EVENTS:
        return False
    if event in ("fcntl.flock", "tempfile.mkdtemp"):
        return True
    path = str(arguments[0])
    return path.startswith(folder) or (not path.startswith("/") and path[:1].isalpha() and "/" in path)
