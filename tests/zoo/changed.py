"""Files behind onnxsim of networks whose structure it changes, with one constant changed: verify must fail them.

python tests/zoo/changed.py                 25 changed files of each width of each network
python tests/zoo/changed.py --changed 100   more of them

Such files are judged by what they compute, with roundings of activations and without. A change that without roundings
has no more effect than rounding errors of float32 cannot be seen so: files that pass are counted by that, and it says
how large the effect is. Exit code 1 where a file passed in which it is more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxsim
from entry import EXACT
from onnx import numpy_helper
from zoo import ENTRIES, trained

from tqexport.backends import BACKENDS
from tqexport.backends.onnx.parameters import without_roundings
from tqexport.backends.onnx.session import OnnxSession
from tqexport.verification.fresh import FreshExports
from tqexport.verification.jobs import Job
from tqexport.verification.run import check
from tqexport.verification.samples import noise
from tqexport.verification.trace import furthest_apart
from tqexport.verification.trial import project_of

NETWORKS = (
    *("ConvNeXt block", "functions in the place of modules", "dilated convolutions over time", "attention block"),
    *("TransformerEncoder", "vision transformer", "LSTM", "GRU"),
)
WIDTHS = (1, 4, 8)
ROUNDING = 4e-6  # of the largest output without roundings of activations: what verify explains in every network
NO_EFFECT = 1e-6  # of it: what the same file may be off by in another runtime


def _one(change: Callable[[Any], Any]) -> Callable[[Random, Any], None]:
    """Change one number of a constant."""

    def change_one(random: Random, numbers: Any) -> None:
        place = random.randrange(numbers.size)
        numbers[place] = change(numbers[place])

    return change_one


def _all(change: Callable[[Any], Any]) -> Callable[[Random, Any], None]:
    """Change all numbers of a constant."""

    def change_all(_: Random, numbers: Any) -> None:
        numbers[:] = change(numbers)

    return change_all


CHANGES = {
    "one times 1.01": _one(lambda number: number * np.float32(1.01)),
    "one times 1.5": _one(lambda number: number * np.float32(1.5)),
    "one times 1 + 2^-17": _one(lambda number: number * np.float32(1 + 2**-17)),
    "one negated": _one(lambda number: -number),
    "one plus 0.1": _one(lambda number: number + np.float32(0.1)),
    "all times 1.0001": _all(lambda numbers: numbers * np.float32(1.0001)),
    "all times 1.01": _all(lambda numbers: numbers * np.float32(1.01)),
    "all plus 0.0001": _all(lambda numbers: numbers + np.float32(1e-4)),
}


def changed(content: bytes, random: Random) -> tuple[bytes, str]:
    """A file with another constant of floats, and what was done to it."""
    model = onnx.load_from_string(content)
    tensor = random.choice([each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT])
    value = numpy_helper.to_array(tensor).copy()
    what = random.choice([*CHANGES])
    CHANGES[what](random, value.reshape(-1))
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model.SerializeToString(), f"{tensor.name} {value.shape}, {what}"


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    parser.add_argument("--changed", type=int, default=25, help="files of each width of each network")
    arguments = parser.parse_args()
    files = effective = wrong = within = 0
    for entry in (entry for entry in ENTRIES if entry.name in NETWORKS):
        project = project_of(trained(entry))
        signature, fresh = project.model.info.signature, FreshExports(project, {})
        batch = noise(64, signature).inputs
        for bits in WIDTHS:
            model = onnx.load_from_string(fresh.fixed("onnx", EXACT, bits, widths=WIDTHS))
            right = onnxsim.simplify(model)[0].SerializeToString()
            expected = OnnxSession(right).run(batch)
            for seed in range(arguments.seed, arguments.seed + arguments.changed):
                content, what = changed(right, Random(f"{entry.name} {bits} {seed}"))
                files += 1
                if furthest_apart(OnnxSession(content).run(batch), expected) < NO_EFFECT:
                    continue
                effective += 1
                job = Job(bits, BACKENDS["onnx"], EXACT, "file", content)
                checked = [*check(project, job, noise(32, signature), (), fresh)]
                if all(each.deployed.passed and each.unoptimized.passed for each in checked):
                    smooth = [without_roundings(each, None).run(batch) for each in (content, right)]
                    off = furthest_apart(*smooth)
                    within += off <= ROUNDING
                    wrong += off > ROUNDING
                    say(f"  {entry.name}, {bits} bits, seed {seed}: {what} passed; off by {off:.1e} without roundings")
        say(f"{entry.name}: {files} files so far, {effective} with an effect")
    say(f"{files} files, {effective} with an effect, {wrong} passed, and {within} that rounding explains")
    return 1 if wrong else 0


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
