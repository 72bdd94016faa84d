"""Commands that are killed, interrupted, out of disk or out of step: nothing visible is half-written.

Run ``python tests/interruption/run.py``. Every trial is a command in a process of its own that is disturbed: in a
quarter it is ended by the clock, in half right before one of its operations on files, which are the moments that
matter, and in a quarter the disk is full. The network is a small one, and its layers are traced once, but for trials
that are ended by the clock: files are written in the same steps, and a trial spends its time on these. Processes are
forked from one that has imported what commands import, those of TFLite's converter and of Dask's workers too. After
each trial:

* the inputs are as they were;
* every visible file is, byte for byte, what an undisturbed run writes, or what was there before;
* the manifest agrees with the files, or reading it says what to do;
* what is interrupted or out of disk says so in one line, with its exit code, and leaves nothing temporary;
* the same command, run again, succeeds, gives the files of an undisturbed run, and leaves nothing temporary either.

Exit code 1 where anything of this does not hold.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from checks import WrongError
from command_lines import COMMANDS
from trials import replaced, trial, two_at_once
from workplace import make_workplace

from tqexport.errors import InputError

EVERYTHING = (*COMMANDS, "two at once", "checkpoint replaced")


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--trials", type=int, default=60, help="of each command")
    parser.add_argument("--commands", default=",".join(EVERYTHING), help="which, by name, separated by commas")
    arguments = parser.parse_args()
    names = arguments.commands.split(",")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a command takes it over
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="interruption-") as root:
        place = make_workplace(Path(root), list(dict.fromkeys(name if name in COMMANDS else "onnx" for name in names)))
        kinds = ("clock", "operation", "operation", "disk")
        jobs: dict[str, Callable[[Random, int], str]] = {
            name: lambda random, number, name=name: trial(place, name, random, kinds[number % len(kinds)])
            for name in COMMANDS
        }
        jobs["two at once"] = lambda random, _: two_at_once(place, random)
        jobs["checkpoint replaced"] = lambda random, _: replaced(place, random)
        for name, job in ((name, jobs[name]) for name in names):
            outcomes: Counter[str] = Counter()
            for number in range(arguments.trials):
                seed = arguments.seed + number
                try:
                    outcomes[job(Random(f"{name} {seed}"), number)] += 1
                except (WrongError, InputError) as error:
                    outcomes["WRONG"] += 1
                    say(f"  {name}, seed {seed}: {error}")
            wrong += outcomes["WRONG"]
            counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            say(f"{name}: {sum(outcomes.values())} trials, {outcomes['WRONG']} wrong ({counted})")
    return 1 if wrong else 0


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
