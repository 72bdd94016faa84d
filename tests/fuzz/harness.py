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
_OWN = ("tqexport.reading.apart", "tqexport.backends.tflite.onnx2tf_worker")  # processes that tqexport starts
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
        if event in _PROGRAMS and not any(name in str(arguments) for name in _OWN):
            self.started.append(f"{event} {str(arguments)[:200]}")
        writes = event == "open" and isinstance(arguments[1], str) and set("wxa+") & set(arguments[1])
        if (writes or event in _CHANGES) and not self._inside(arguments[0]):
            self.written.append(f"{event} {str(arguments[0])[:200]}")

    def _inside(self, path: object) -> bool:
        if isinstance(path, int):
            return True
        place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - which follows no link
        temporary = "/tqexport.tmp." in place  # a folder of the run's own, for the converter
        return place.startswith(str(self.folder)) or place == os.devnull or "__pycache__" in place or temporary


_watch: _Watch | None = None


def watched(reader: Reader, seed: int, folder: Path, figures: Figures) -> None:
    """Let a reader read the input of one seed, and enter into the figures what became of it."""
    global _watch
    _watch = _watch or _Watch()
    path = reader.write(folder, Random(f"{reader.name} {seed}"))
    _forget_peak()
    ended, computed = _of_children_that_ended(), _processor_seconds()
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
    seconds, mib = time.perf_counter() - start, _peak(ended) >> 20
    computed = _processor_seconds() - computed
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
        figures.remarks.append(f"seed {seed}: {seconds:.1f} s, {computed:.1f} of them computing, {mib} MiB")


def _children() -> list[Path]:
    """Where the system tells of the processes that this one started and that are alive."""
    process = os.getpid()
    return [Path("/proc", child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _of_children_that_ended() -> int:
    """The most KiB of memory that one of them had; it never goes down."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _forget_peak() -> None:
    for process in (Path("/proc/self"), *_children()):
        (process / "clear_refs").write_text("5")


def _peak(ended_before: int) -> int:
    """Bytes of memory that this process or one that it started had at most since they were forgotten.

    Args:
        ended_before: What :func:`_of_children_that_ended` gave then.
    """
    peaks = [_of_children_that_ended()] if _of_children_that_ended() > ended_before else [0]
    for process in (Path("/proc/self"), *_children()):
        said = re.search(r"VmHWM:\s*(\d+)", (process / "status").read_text())
        peaks.append(int(said[1]) if said else 0)
    return max(peaks) << 10


def _processor_seconds() -> float:
    """What this process and those that it started have computed, without waiting for their turn."""
    used = os.times()
    total = used.user + used.system + used.children_user + used.children_system
    for process in _children():
        counted = (process / "stat").read_text().rpartition(")")[2].split()
        total += (int(counted[11]) + int(counted[12])) / os.sysconf("SC_CLK_TCK")
    return total
