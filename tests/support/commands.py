"""The command line: called in this process, where a process of its own would add nothing but its start."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqexport.cli import main

__all__ = ["COMMAND", "Done", "run", "run_process"]

COMMAND = Path(sys.executable).with_name("tqexport")


@dataclass(frozen=True)
class Done:
    """What a command did; named as in ``subprocess.CompletedProcess``."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, cwd: Path, entry: Callable[[], object] = main) -> Done:
    """Run ``tqexport ARGUMENTS`` in a folder, by the entry point that the installed command has, or by another."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with _as_it_was(), contextlib.chdir(cwd):
        sys.argv = ["tqexport", *map(str, arguments)]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                entry()
            except SystemExit as end:
                code = end.code
    assert isinstance(code, int)
    return Done(code, stdout.getvalue(), stderr.getvalue())


def run_process(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``tqexport ARGUMENTS`` in a process of its own."""
    line = [str(COMMAND), *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """A command sets up logging, catches interrupts and imports what users name; afterwards all of it is undone."""
    root, package = logging.getLogger(), logging.getLogger("tqexport")
    handlers, level, path, argv = root.handlers[:], package.level, sys.path[:], sys.argv
    modules, interrupt = set(sys.modules), signal.getsignal(signal.SIGINT)
    terminate = signal.getsignal(signal.SIGTERM)
    root.handlers[:] = []  # where there is one, basicConfig does nothing
    here = os.getcwd()
    try:
        yield
    finally:
        os.chdir(here)
        root.handlers[:] = handlers
        package.setLevel(level)
        sys.argv = argv
        added = {entry for entry in sys.path if entry not in path}
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") in added:  # noqa: PTH120
                del sys.modules[name]
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
