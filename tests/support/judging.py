"""Verdicts on changed and on rewritten files of the digits network, as ``tqexport verify`` gives them."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mutations import mutated_onnx, mutated_tflite
from places import DIGITS, DIGITS_DATA, DIGITS_INT
from rewrites import FIXED_ALONE, ONNX_REWRITES, TFLITE_REWRITES, Rewrite

from tqexport import ReadOptions, load_checkpoint, save_checkpoint
from tqexport.artifacts.project import open_project
from tqexport.backends import BACKENDS, open_runner
from tqexport.backends.base import EXACT
from tqexport.backends.parameters import Parameters
from tqexport.errors import TqExportError
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.names import INTEGER, PACKED, SYMMETRIC, is_integer
from tqexport.verification.fresh import FreshExports
from tqexport.verification.jobs import Job
from tqexport.verification.run import Checked, check
from tqexport.verification.samples import load_samples, random_samples

__all__ = ["KINDS", "Judge", "Kind", "Outcome", "outcomes", "rewrites_of"]

WIDTHS = range(1, 9)
_OF_SEVEN_BITS = range(1, 8)  # where 8 bits take another form or none


@dataclass(frozen=True)
class Kind:
    """A kind of file: back end, kernel, and whether it is a run-time file."""

    backend: str
    kernel: str = EXACT
    switched: bool = False

    @property
    def packed(self) -> bool:
        """Whether codes take fewer than 8 bits in it."""
        return self.kernel.endswith("packed")

    @property
    def widths(self) -> Collection[int]:
        """The widths that there are such files of."""
        packed = self.backend == "tflite" and self.kernel == PACKED
        if packed or self.kernel == SYMMETRIC or (self.switched and is_integer(self.kernel)):
            return _OF_SEVEN_BITS
        return BACKENDS[self.backend].packed_widths if self.packed else WIDTHS

    def __str__(self) -> str:
        return f"{'run-time' if self.switched else 'fixed'} {self.backend} {self.kernel}"


KINDS = (
    *(Kind(name, kernel) for name in ("onnx", "tflite") for kernel in BACKENDS[name].kernels),
    *(Kind(name, switched=True) for name in ("onnx", "tflite")),
    Kind("onnx", INTEGER, switched=True),
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
    """Has the right files at hand."""

    def __init__(self, folder: Path, samples: int = 32) -> None:
        """Open the digits network and its integer twins.

        Args:
            folder: Written to by nothing that follows.
            samples: How many random ones verify compares.
        """
        symmetric = folder / "symmetric.pt"
        model = load_checkpoint(DIGITS)
        inputs = load_samples(DIGITS_DATA, model).inputs[0]
        calibrated = calibrate(model, inputs[:200], symmetric=True)
        save_checkpoint(symmetric, calibrated.module, calibrated.info)
        self._projects = {path: open_project(path, folder, ReadOptions()) for path in (DIGITS, DIGITS_INT, symmetric)}
        self._symmetric = symmetric
        plan = {(kind.backend, kind.kernel, None): {*kind.widths} for kind in KINDS if not is_integer(kind.kernel)}
        self._fresh = {
            path: FreshExports(project, plan if path == DIGITS else {}) for path, project in self._projects.items()
        }
        digits = inputs[:200]
        noise = np.random.default_rng(1).standard_normal(digits.shape).astype(np.float32)
        self._tried = np.concatenate([digits, noise])
        self._samples = random_samples(model, samples)
        self._outputs: dict[tuple[Kind, int], Any] = {}

    def fresh(self, kind: Kind) -> FreshExports:
        """What the checkpoint of a kind of file gives."""
        return self._fresh[self._checkpoint(kind)]

    def right(self, kind: Kind, bits: int) -> bytes:
        """The file as it is exported."""
        if kind.switched:
            return self.fresh(kind).run_time(kind.backend, kind.kernel)
        return self.fresh(kind).fixed(kind.backend, kind.kernel, bits)

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
        bits, ways = random.choice(kind.widths), sorted(rewrites_of(kind))
        chosen = [ways[seed % len(ways)], *random.sample(ways, random.randrange(3))]
        content = self.right(kind, bits)
        for way in chosen:
            content = rewrites_of(kind)[way](content, random)
        return self._outcome(kind, seed, bits, ", ".join(chosen), content)

    def checked(self, kind: Kind, bits: int, content: bytes, make: type[Job] = Job) -> list[Checked]:
        """What verify says of a file, in each runtime.

        Args:
            kind: What it is.
            bits: At which width.
            content: The file.
            make: What asks for the comparison of its parameters.
        """
        job = make(bits, BACKENDS[kind.backend], kind.kernel, "file", content, run_time=kind.switched)
        return list(check(self._projects[self._checkpoint(kind)], job, self._samples, (), self.fresh(kind)))

    def _checkpoint(self, kind: Kind) -> Path:
        if kind.kernel == SYMMETRIC:
            return self._symmetric
        return DIGITS_INT if is_integer(kind.kernel) else DIGITS

    def _outcome(self, kind: Kind, seed: int, bits: int, what: str, content: bytes) -> Outcome:
        what = f"at {bits} bits: {what}"
        if (kind, bits) not in self._outputs:
            self._outputs[kind, bits] = self._run(kind, bits, self.right(kind, bits))
        try:
            outputs = self._run(kind, bits, content)
            effect = not np.array_equal(outputs, self._outputs[kind, bits], equal_nan=True)
            full = self.checked(kind, bits, content)
            # Whatever the parameters say, they are no longer asked.
            passed = all(each.passed for each in full)
            plain = passed or all(each.passed for each in self.checked(kind, bits, content, _Unproved))
        except TqExportError as error:  # refused, which is no pass
            return Outcome(seed, what, True, False, False, (str(error),))
        problems = tuple(problem for each in full for problem in each.problems)
        return Outcome(seed, what, effect, passed, plain, problems, full[0].unoptimized.parameters)

    def _run(self, kind: Kind, bits: int, content: bytes) -> Any:
        """What a file computes of digits and noise, in each runtime."""
        if not is_integer(kind.kernel):
            return open_runner(content, bits if kind.switched else None).run_untouched((self._tried,))
        model = self._projects[self._checkpoint(kind)].model
        network = functools.partial(integer_model, model)
        opened = BACKENDS[kind.backend].open_integers(content, network, bits, switched=kind.switched)
        return [runtime.run_untouched(self._tried) for runtime in opened]


class _Unproved(Job):
    """A file whose parameters nothing is known of."""

    def parameters(self, fresh: FreshExports) -> Parameters:  # noqa: ARG002
        return Parameters(self.content, not_compared="they are not asked for here")


def rewrites_of(kind: Kind) -> dict[str, Rewrite]:
    """The ways to rewrite a kind of file, by name."""
    ways = ONNX_REWRITES if kind.backend == "onnx" else TFLITE_REWRITES
    return {name: way for name, way in ways.items() if not (kind.switched and name in FIXED_ALONE)}


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
