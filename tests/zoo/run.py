"""Run the zoo, and write docs/zoo.md.

python tests/zoo/run.py              every network; make zoo does the same
python tests/zoo/run.py GRU LSTM     those whose name contains one of these; writes nothing
python tests/zoo/run.py --published  those that other packages publish, and docs/published.md; make published does so

Exit code 1 where a network comes out otherwise than the zoo expects.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from entry import EXACT, Entry
from zoo import GROUPS, WIDTHS, Outcome, run_entry

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = "--published"
_TITLES = {
    "zoo.md": "# Which networks it takes",
    "published.md": """# Published architectures

These are networks of [torchvision](https://docs.pytorch.org/vision), [timm](https://huggingface.co/docs/timm) and
[transformers](https://huggingface.co/docs/transformers) as they come: no line of theirs was changed. The weights are
random. Those of torchvision and timm are as large as they are, those of transformers small.""",
}
_TOP = f"""
Every network here was prepared, trained for three steps, exported to ONNX and TFLite, as a file for each of
{", ".join(map(str, WIDTHS[:-1]))} and {WIDTHS[-1]} bits and as one run-time file, and each file was verified layer by
layer. *exact* means that all of them equal PyTorch; otherwise the sentence is the one that refuses the network. The
first and the last layer stay in float, as `prepare` has it. `tqexport check` says the same of
[a network of yours](your-network.md#before-training). Written by `make {{}}`.
"""
_REWRITTEN = """
The ONNX file of 4 bits was also verified behind onnxsim, as it is and with the batch fixed to 1. *Parameters equal*:
every constant was compared. *Outputs equal*: onnxsim gives the file another structure, so each weight was looked for in
it, and the rest judged by what it computes. *Fails*: a right file that `verify` does not know, as onnxsim multiplied or
added constants into a weight.
"""


def groups(published: bool) -> Mapping[str, Sequence[Entry]]:
    """The networks by kind: those of the zoo, or the published ones."""
    if not published:
        return GROUPS
    import of_timm
    import of_torchvision
    import of_transformers

    return {
        "torchvision": of_torchvision.ENTRIES,
        "timm": of_timm.ENTRIES,
        "transformers": of_transformers.ENTRIES,
    }


def page(name: str, kinds: Mapping[str, Sequence[Entry]], outcomes: dict[str, Outcome]) -> str:
    """The table of every network."""
    exact = sum(outcome.onnx == outcome.tflite == EXACT for outcome in outcomes.values())
    parts = [_TITLES[name], _TOP.format(Path(name).stem)]
    summary = f"Of {len(outcomes)} networks {exact} are exact in both formats."
    rewritten = Counter(outcome.rewritten for outcome in outcomes.values() if outcome.rewritten)
    head = "| network | takes | ONNX | TFLite |"
    if rewritten:
        said = ", ".join(f"{count} *{came}*" for came, count in rewritten.most_common())
        summary += f" Behind onnxsim: {said}."
        head += " behind onnxsim |"
        parts.append(_REWRITTEN.strip() + "\n")
    parts.append(f"{summary}\n")
    for group, entries in kinds.items():
        rows = [row(entry, outcomes[entry.name]) for entry in entries]
        parts.append("\n".join([f"## {group}\n", head, "|---" * (head.count("|") - 1) + "|", *rows, ""]))
    return "\n".join(parts)


def row(entry: Entry, outcome: Outcome) -> str:
    """The row of a network."""
    cells = [entry.name, takes(entry), cell(outcome.onnx), cell(outcome.tflite), outcome.rewritten]
    return f"| {' | '.join(filter(None, cells))} |"


def takes(entry: Entry) -> str:
    """The inputs of a network."""
    return ", ".join(f"{'x'.join(map(str, each.shape))} {each.dtype}" for each in entry.inputs)


def cell(outcome: str) -> str:
    """An outcome in a table."""
    return re.sub(r"\x1b\[\d+m", "", outcome).replace("|", "\\|").replace("\n", " ")


def work(published: bool, name: str) -> tuple[Outcome, float]:
    """Run one network in a process of its own, and time it."""
    warnings.simplefilter("ignore")
    began = time.monotonic()
    entries = [entry for entries in groups(published).values() for entry in entries]
    entry = next(entry for entry in entries if entry.name == name)
    return run_entry(entry, rewritten=not published), time.monotonic() - began


def main(words: Sequence[str]) -> int:
    """Run the networks, two at a time."""
    published, words = PUBLISHED in words, [word.lower() for word in words if word != PUBLISHED]
    kinds = groups(published)
    entries = [entry for entries in kinds.values() for entry in entries]
    chosen = [entry for entry in entries if not words or any(word in entry.name.lower() for word in words)]
    outcomes: dict[str, Outcome] = {}
    unexpected = 0
    began = time.monotonic()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = pool.map(partial(work, published), [entry.name for entry in chosen])
        for entry, (outcome, seconds) in zip(chosen, results, strict=True):
            outcomes[entry.name] = outcome
            good = outcome.as_expected(entry)
            unexpected += not good
            mark = "" if good else "UNEXPECTED "
            say(f"{mark}{entry.name} ({seconds:.0f} s, {outcome.quantized} weights)")
            say(f"  onnx: {outcome.onnx}\n  tflite: {outcome.tflite}\n  behind onnxsim: {outcome.rewritten}")
    say(f"{len(chosen)} networks in {time.monotonic() - began:.0f} s, {unexpected} came out otherwise than expected")
    if not words:
        name = "published.md" if published else "zoo.md"
        (DOCS / name).write_text(page(name, kinds, outcomes), encoding="utf-8")
    return 1 if unexpected else 0


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
