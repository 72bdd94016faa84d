"""What every fuzz target has: hostile inputs by seed, and reading them as the commands do, watched."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
import traceback
from abc import ABC, abstractmethod
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tqexport.errors import TqExportError

__all__ = ["ROOT", "Figures", "Reader", "watched"]

ROOT = Path(__file__).parents[2]
_GIB = 1 << 30
_SECONDS = 10.0
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move")


class Reader(ABC):
    """One reader of tqexport under attack."""

    name: str

    @abstractmethod
    def write(self, folder: Path, random: Random) -> Path:
        """Write a hostile input into an empty folder; returns what :meth:`read` takes."""

    @abstractmethod
    def read(self, path: Path) -> None:
        """Read it as the commands do, as far as they would go.

        Raises:
            TqExportError: It is refused.
        """


@dataclass
class Figures:
    """What became of the inputs of one reader."""

    reader: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: int = 0
    signals: int = 0
    executions: int = 0
    outside: int = 0
    above_1_gib: int = 0
    above_10_s: int = 0
    max_mib: int = 0
    max_seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)

    @property
    def broken(self) -> int:
        """How often a promise was broken."""
        marks = (self.tracebacks, self.signals, self.executions, self.outside, self.above_1_gib, self.above_10_s)
        return sum(marks)


class _Watch:
    """Notes what Python starts and writes outside of a folder; there is no way to take an audit hook off again."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.started: list[str] = []
        self.written: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event in _PROGRAMS and "tqexport.reading.apart" not in str(arguments):
            self.started.append(f"{event} {str(arguments)[:200]}")
        writes = event == "open" and isinstance(arguments[1], str) and set("wxa+") & set(arguments[1])
        if (writes or event in _CHANGES) and not self._inside(arguments[0]):
            self.written.append(f"{event} {str(arguments[0])[:200]}")

    def _inside(self, path: object) -> bool:
        if isinstance(path, int):
            return True
        place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - which follows no link
        return place.startswith(str(self.folder)) or place == os.devnull or "__pycache__" in place


_watch: _Watch | None = None


def watched(reader: Reader, seed: int, folder: Path, figures: Figures) -> None:
    """Let a reader read the input of one seed, and enter into the figures what became of it."""
    global _watch
    _watch = _watch or _Watch()
    path = reader.write(folder, Random(f"{reader.name} {seed}"))
    _forget_peak()
    _watch.folder, _watch.started, _watch.written = str(folder), [], []
    start, remark = time.perf_counter(), ""
    try:
        with chdir(folder):
            reader.read(path)
        figures.accepted += 1
    except TqExportError as error:
        figures.refused += 1
        if not str(error).strip() or "\n" in str(error).strip():
            remark = f"not a sentence: {error!r}"
    except Exception as error:
        figures.tracebacks += 1
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tqexport/" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        remark = f"{type(error).__name__} at {place}: {str(error)[:150]}"
    finally:
        _watch.folder = None
    seconds, mib = time.perf_counter() - start, _peak() >> 20
    figures.inputs += 1
    figures.max_seconds, figures.max_mib = max(figures.max_seconds, seconds), max(figures.max_mib, mib)
    figures.above_10_s += seconds > _SECONDS
    figures.above_1_gib += mib << 20 > _GIB
    figures.executions += bool(_watch.started) or (folder / "executed").exists()
    figures.outside += bool(_watch.written)
    for text in (remark, *_watch.started, *_watch.written):
        if text:
            figures.remarks.append(f"seed {seed}: {text}")
    if seconds > _SECONDS or mib << 20 > _GIB:
        figures.remarks.append(f"seed {seed}: {seconds:.1f} s, {mib} MiB")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes of memory that this process had at most since they were forgotten, or a child that ended."""
    own = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(int(own[1]) if own else 0, children) << 10
