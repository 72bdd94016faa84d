"""Files of the digits network, changed and rewritten at random: verify must fail the ones and pass the others.

Run ``python tests/torture.py``. For each kind of file it says how many changes had an effect on digits or noise, how
many of these passed verification, how many would have passed without the comparison of parameters, and how many
rewritten files failed. Exit code 1 on a wrong verdict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

from judging import KINDS, Kind, outcomes


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    parser.add_argument("--changed", type=int, default=160, help="changed files of each kind")
    parser.add_argument("--rewritten", type=int, default=40, help="rewritten files of each kind")
    parser.add_argument("--kinds", default="", help="only those with this in their name, such as integer")
    arguments = parser.parse_args()
    first = arguments.seed
    wrong = 0
    for kind in (kind for kind in KINDS if arguments.kinds in str(kind)):
        wrong += _changed(kind, range(first, first + arguments.changed))
        wrong += _rewritten(kind, range(first, first + arguments.rewritten))
    return 1 if wrong else 0


def _changed(kind: Kind, seeds: Sequence[int]) -> int:
    """Change files; returns how many passed all the same."""
    effective = [outcome for outcome in outcomes("changed", kind, seeds) if outcome.effect]
    passed = [outcome for outcome in effective if outcome.passed]
    without = sum(outcome.passed_by_samples for outcome in effective)
    ended = sum("the process ended" in outcome.what for outcome in effective)
    _say(
        f"{kind}: {len(seeds)} changed, {len(effective)} with an effect, {len(passed)} false passes "
        f"({without} without the comparison of parameters), {ended} ended the process"
    )
    for outcome in passed:
        _say(f"  seed {outcome.seed} {outcome.what}: {outcome.compared}")
    return len(passed)


def _rewritten(kind: Kind, seeds: Sequence[int]) -> int:
    """Rewrite files; returns how many failed all the same."""
    found = list(outcomes("rewritten", kind, seeds))
    failed = [outcome for outcome in found if not outcome.passed]
    unproved = sum(outcome.passed and outcome.compared != "equal" for outcome in found)
    _say(f"{kind}: {len(seeds)} rewritten, {len(failed)} false alarms, {unproved} passed by their samples alone")
    for outcome in failed:
        _say(f"  seed {outcome.seed} {outcome.what}: {outcome.compared} {outcome.problems[:1]}")
    return len(failed)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
