"""What SIGINT and SIGTERM do to a command: it ends at once, and nothing of it is left.

No exception is raised. It would come in the middle of whatever runs: compiled code turns it into an error of its own or
aborts, and Python drops it where an object is destroyed.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from tqexport.files import remove_temporary

__all__ = ["WORD", "end_on_interrupts"]

WORD = "interrupted"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\r\x1b[K\x1b[?25h"  # ends the line of a spinner, which hides the cursor


def end_on_interrupts() -> None:
    """From now on, let these signals end this process; in a thread that is not the main one, change nothing."""
    if threading.current_thread() is threading.main_thread():
        try:
            errors = os.dup(2)  # which a runtime that says too much is kept from for a moment
        except OSError:  # it is closed
            errors = -1
        for number in _SIGNALS:
            signal.signal(number, functools.partial(_end, errors))


def _end(errors: int, number: int, _frame: FrameType | None) -> None:
    """End this process with the exit code of a signal, having said so where errors go."""
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    for process in [*_started_by(os.getpid())]:  # or they would go on writing into what is removed
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    remove_temporary()
    with suppress(Exception):  # it may be this very stream that was being written
        sys.stdout.flush()
    with suppress(OSError):
        os.write(errors, f"{_SHOW_CURSOR if os.isatty(errors) else ''}{WORD}\n".encode())
    os._exit(128 + number)


def _started_by(process: int) -> Iterator[int]:
    """The processes that one started, and those that they did, where the system tells."""
    for entry in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, entry.read_text().split()):
                yield child
                yield from _started_by(child)
