"""The converter's process with TensorFlow imported once: it forks for each conversion, which saves three seconds each.

What a conversion does is that of tqexport, in a process that has converted nothing before and ends with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqexport.backends.tflite import onnx2tf_worker

__all__ = ["WarmConverter", "convert_and_end"]


class WarmConverter:
    """Takes the place of :func:`tqexport.backends.tflite.onnx2tf.run_worker`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run_worker(self, folder: Path, pairs: Sequence[str]) -> tuple[int, str]:
        """Convert; returns exit code and what was printed."""
        if self._process is None:
            environment = {**os.environ, **onnx2tf_worker.ENVIRONMENT}
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(folder), *pairs]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), (folder / "printed").read_text(errors="replace")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with self._process as process:
                process.communicate()


def serve() -> None:
    """Fork for each line of standard input: a folder, and pairs of files."""
    import onnx2tf  # noqa: F401 - imported for those that are forked
    import tensorflow as tf  # noqa: F401
    import tf_keras  # noqa: F401

    for line in sys.stdin:
        folder, *pairs = json.loads(line)
        child = os.fork()
        if not child:
            _convert(Path(folder), pairs)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _convert(folder: Path, pairs: list[str]) -> NoReturn:
    """What the worker does, and the end of this process; it prints into a file."""
    printed = os.open(folder / "printed", os.O_CREAT | os.O_WRONLY)
    never_written, _ = os.pipe()
    convert_and_end(folder, pairs, never_written, printed)


def convert_and_end(folder: Path, pairs: Sequence[str], lifeline: int, printed: int) -> NoReturn:
    """In a process that was forked: what the worker does, and the end of the process.

    Args:
        folder: Where it works.
        pairs: What it converts.
        lifeline: A descriptor; at the end of what it gives, the process ends too.
        printed: A descriptor that it prints to.
    """
    code = 1
    try:
        for descriptor, target in ((lifeline, 0), (printed, 1), (printed, 2)):
            os.dup2(descriptor, target)
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        onnx2tf_worker.main([*pairs])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
