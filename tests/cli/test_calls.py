"""Calling commands in this process leaves it as it was, so that the tests which do so prove what a process would."""

from __future__ import annotations

import logging
import os
import signal
import sys

from commands import run, run_process
from places import DIGITS


def state():
    """What a command changes while it runs."""
    root = logging.getLogger()
    package = logging.getLogger("tqexport").level
    return os.getcwd(), sys.argv, sys.path[:], root.handlers[:], package, signal.getsignal(signal.SIGINT)


def test_a_call_is_what_a_process_is_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "mine.py").write_text("def build():\n    raise ValueError('no network')\n")
    before = state()
    for arguments in (
        ["onnx", "nothing.pt", "--json"],
        ["inspect", DIGITS, "--model", "mine:build", "--verbose"],
        ["onnx", "nothing.pt", "--speed"],
    ):
        process, call = run_process(*arguments, cwd=tmp_path), run(*arguments, cwd=tmp_path)
        assert (call.returncode, call.stdout, call.stderr) == (process.returncode, process.stdout, process.stderr)
        assert call.returncode > 1
        assert state() == before
    assert "mine" not in sys.modules
