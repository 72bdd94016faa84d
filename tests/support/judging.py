"""Verdicts on changed and on rewritten files of the digits network."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mutations import mutated_onnx, mutated_tflite
from places import DIGITS, DIGITS_DATA
from rewrites import FIXED_ALONE, ONNX_REWRITES, TFLITE_REWRITES

from tqexport import ReadOptions
from tqexport.artifacts.project import open_project
from tqexport.backends import BACKENDS, open_runner
from tqexport.backends.base import EXACT, EXACT_PACKED
from tqexport.errors import TqExportError
from tqexport.verification.comparison import Comparison, Verdict
from tqexport.verification.fresh import FreshExports
from tqexport.verification.samples import load_samples, random_samples

__all__ = ["KINDS", "Judge", "Kind", "Outcome", "outcomes"]

WIDTHS = range(1, 9)


@dataclass(frozen=True)
class Kind:
    """A kind of file: back end, kernel, and whether it is a run-time file."""

    backend: str
    kernel: str = EXACT
    switched: bool = False

    @property
    def packed(self) -> bool:
        """Whether codes take fewer than 8 bits in it."""
        return self.kernel == EXACT_PACKED

    @property
    def widths(self) -> Collection[int]:
        """The widths that there are such files of."""
        return BACKENDS[self.backend].packed_widths if self.packed else WIDTHS

    def __str__(self) -> str:
        return f"{'run-time' if self.switched else 'fixed'} {self.backend} {self.kernel}"


KINDS = (
    Kind("onnx"),
    Kind("onnx", EXACT_PACKED),
    Kind("onnx", switched=True),
    Kind("tflite"),
    Kind("tflite", EXACT_PACKED),
    Kind("tflite", switched=True),
    Kind("tflite", "dynamic"),
)


@dataclass(frozen=True)
class Outcome:
    """What came of one file.

    Attributes:
        seed: What it was made from.
        what: What was done to it, and at which width it was looked at.
        effect: Whether it computes something else than before, on digits or on noise.
        passed: What verify says.
        passed_by_samples: What it would say without comparing the parameters.
        problems: What it says is wrong.
        compared: Whether parameters were compared.
    """

    seed: int
    what: str
    effect: bool
    passed: bool
    passed_by_samples: bool
    problems: tuple[str, ...] = ()
    compared: str = ""


class Judge:
    """Has the right files at hand.

    Attributes:
        fresh: They are made of the checkpoint when first asked for.
    """

    def __init__(self, folder: Path) -> None:
        """Open the digits network; ``folder`` is written to by nothing that follows."""
        self._project = open_project(DIGITS, folder, ReadOptions())
        self.fresh = FreshExports(self._project, {(kind.backend, kind.kernel, 1): {*kind.widths} for kind in KINDS})
        self._samples = random_samples(self._project.model, 32).inputs
        digits = load_samples(DIGITS_DATA, self._project.model).inputs[0][:200]
        noise = np.random.default_rng(1).standard_normal(digits.shape).astype(np.float32)
        self._tried = np.concatenate([digits, noise])
        self._outputs: dict[tuple[Kind, int], Any] = {}

    def right(self, kind: Kind, bits: int) -> bytes:
        """The file as it is exported."""
        if kind.switched:
            return self.fresh.run_time(kind.backend, kind.kernel)
        return self.fresh.fixed(kind.backend, kind.kernel, bits)

    def changed(self, kind: Kind, seed: int) -> Outcome:
        """Change a file in one place, and judge it."""
        random = Random(f"{kind} {seed}")
        bits = random.choice(kind.widths)
        content = self.right(kind, bits)
        if kind.backend == "onnx":
            what, content = mutated_onnx(content, random)
        else:
            what, content = mutated_tflite(content, random, bits if kind.switched else None)
        return self._outcome(kind, seed, bits, what, content)

    def rewritten(self, kind: Kind, seed: int) -> Outcome:
        """Rewrite a file in one to three ways, and judge it."""
        random = Random(f"{kind} {seed}")
        bits, known = random.choice(kind.widths), ONNX_REWRITES if kind.backend == "onnx" else TFLITE_REWRITES
        ways = sorted({*known} - (FIXED_ALONE if kind.switched else set()))
        chosen = [ways[seed % len(ways)], *random.sample(ways, random.randrange(3))]
        content = self.right(kind, bits)
        for way in chosen:
            content = known[way](content, random)
        return self._outcome(kind, seed, bits, ", ".join(chosen), content)

    def _outcome(self, kind: Kind, seed: int, bits: int, what: str, content: bytes) -> Outcome:
        what, width = f"at {bits} bits: {what}", bits if kind.switched else None
        if (kind, bits) not in self._outputs:
            self._outputs[kind, bits] = open_runner(self.right(kind, bits), width).run_untouched((self._tried,))
        try:
            outputs = open_runner(content, width).run_untouched((self._tried,))
            effect = not np.array_equal(outputs, self._outputs[kind, bits], equal_nan=True)
            parameters = self.fresh.compare(kind.backend, kind.kernel, content, bits, switched=kind.switched)
            full = [self._verdict(kind, bits, parameters.content, parameters)]
            # Whatever the parameters say, they are no longer asked; as deployed and layer by layer.
            plain = full if full[0].passed else [self._verdict(kind, bits, content, None)]
        except TqExportError as error:  # refused, which is no pass
            return Outcome(seed, what, True, False, False, (str(error),))
        passed = full[0].passed
        return Outcome(seed, what, effect, passed, plain[0].passed, full[0].problems, full[0].parameters)

    def _verdict(self, kind: Kind, bits: int, content: bytes, parameters: Any) -> Verdict:
        """What verify says of a file; the first verdict that is no pass, of the two ways to run it."""
        for deployed in (True, False):
            kernel = EXACT if kind.switched else kind.kernel
            comparison = Comparison(self._project.model, bits, kernel, parameters)
            runner = open_runner(content, bits if kind.switched else None, deployed=deployed)
            comparison.add(runner.run(self._samples), self._samples)
            verdict = comparison.verdict()
            if not verdict.passed:
                break
        return verdict


def outcomes(how: str, kind: Kind, seeds: Sequence[int]) -> Iterator[Outcome]:
    """Judge files in a process of its own; one that ends it is refused, and another process goes on behind it.

    Args:
        how: ``changed`` or ``rewritten``.
        kind: The kind of file.
        seeds: One for each file.
    """
    context, waiting = multiprocessing.get_context("spawn"), list(seeds)
    while waiting:
        reader, writer = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(how, kind, waiting, writer))
        worker.start()
        writer.close()
        while True:
            try:
                outcome: Outcome = reader.recv()
            except EOFError:
                break
            waiting.remove(outcome.seed)
            yield outcome
        worker.join()
        if waiting:
            ended = f"the process ended with code {worker.exitcode}"
            yield Outcome(waiting.pop(0), ended, True, False, False, (ended,))


def _work(how: str, kind: Kind, seeds: Sequence[int], writer: Any) -> None:
    """Judge files and send the outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(Path(folder))
        for seed in seeds:
            writer.send(getattr(judge, how)(kind, seed))
