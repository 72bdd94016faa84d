"""Hostile inputs for every reader: ``python tests/fuzz/run.py`` prints what became of them.

Each reader works in a process of its own, so that one that dies costs one input and is counted. The same seeds give the
same inputs. Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Figures, Reader, watched

# By reader, where it stands and how many of a thousand inputs are its own.
READERS = {
    "tflite": ("fuzz_tflite:READER", 200),
    "onnx": ("fuzz_onnx:READER", 200),
    "c": ("fuzz_c:READER", 50),
    "checkpoint": ("fuzz_checkpoint:READER", 150),
    "grids": ("fuzz_checkpoint:INTEGERS", 50),
    "research": ("fuzz_research:READER", 50),
    "manifest": ("fuzz_manifest:READER", 150),
    "samples": ("fuzz_samples:READER", 100),
    "pictures": ("fuzz_pictures:READER", 50),
    "commands": ("fuzz_commands:READER", 5),  # besides: all of the above, by name and slowly
}
_HANGS = 60  # seconds after which an input ends its process


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="inputs over all readers")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="for each reader; what was not read then is left out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first input; to go on where another run ended")
    parser.add_argument("--readers", default=",".join(READERS), help="names with commas between them")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return _work(arguments.work[0], int(arguments.work[1]), int(arguments.work[2]))
    every = []
    for name in arguments.readers.split(","):
        count = max(1, arguments.count * READERS[name][1] // 1000)
        start = time.monotonic()
        figures = fuzz(name, arguments.seed, count, arguments.seconds)
        every.append(figures)
        _say(f"{name}: {json.dumps({k: v for k, v in asdict(figures).items() if k not in ('reader', 'remarks')})}")
        _say(
            f"  seeds {arguments.seed} to {arguments.seed + figures.inputs - 1} in {time.monotonic() - start:.0f} s",
            *(f"  {remark}" for remark in figures.remarks),
        )
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(each) for each in every], indent=2) + "\n")
    _say(f"{sum(each.inputs for each in every):,} inputs, {sum(each.broken for each in every)} promises broken")
    return 1 if any(each.broken for each in every) else 0


def fuzz(name: str, first: int, count: int, seconds: float) -> Figures:
    """The figures of one reader, whose process is started again where it dies."""
    total, seed, end = Figures(name), first, first + count
    stop = time.monotonic() + seconds
    while seed < end and time.monotonic() < stop:
        command = [sys.executable, __file__, "--work", name, str(seed), str(end)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for line in process.stdout or ():  # a line for each input
                _add(total, Figures(**json.loads(line)))
                seed += 1
                if time.monotonic() > stop:
                    process.kill()
                    return total
        if process.returncode:
            total.inputs += 1
            total.signals += 1
            total.remarks.append(f"seed {seed}: the process ended with {_ending(process.returncode)}")
            seed += 1
    return total


def _work(name: str, seed: int, end: int) -> int:
    """In the reader's process: a line of figures for each input."""
    reader = reader_named(name)
    _PLACE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_PLACE) as place:
        for number in range(seed, end):
            folder = Path(place) / "input"
            folder.mkdir()
            signal.alarm(_HANGS)
            figures = Figures(name)
            watched(reader, number, folder, figures)
            signal.alarm(0)
            shutil.rmtree(folder)
            _say(json.dumps(asdict(figures)))
            if figures.above_1_gib:
                break  # the next input is read in a new process, whose memory is its own
    return 0


def reader_named(name: str) -> Reader:
    """A reader by its name."""
    module, _, attribute = READERS[name][0].partition(":")
    reader: Reader = getattr(importlib.import_module(module), attribute)
    return reader


def _add(total: Figures, one: Figures) -> None:
    for entry in fields(Figures):
        a, b = getattr(total, entry.name), getattr(one, entry.name)
        if entry.name != "reader":
            setattr(total, entry.name, max(a, b) if entry.name.startswith("max") else a + b)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


_PLACE = Path(tempfile.gettempdir()) / "tqexport-fuzz"


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
