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

from tqexport.backends.tflite import onnx2tf_worker

__all__ = ["WarmConverter"]


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


def _convert(folder: Path, pairs: list[str]) -> None:
    """What the worker does, and the end of this process."""
    code = 1
    try:
        printed = os.open(folder / "printed", os.O_CREAT | os.O_WRONLY)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        never_written, _ = os.pipe()
        os.dup2(never_written, 0)
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        onnx2tf_worker.main(pairs)
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
