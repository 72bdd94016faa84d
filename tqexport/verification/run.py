"""Verifying a project: finds or makes the artifacts, runs them on samples, and compares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from tqexport.artifacts.project import Project
from tqexport.backends.base import EXACT, Backend
from tqexport.backends.parameters import Parameters
from tqexport.backends.running import Runner, RuntimeRun
from tqexport.errors import about
from tqexport.integer.names import is_integer
from tqexport.verification.comparison import Comparison, Verdict
from tqexport.verification.fresh import FileKind, FreshExports, Opener
from tqexport.verification.jobs import Job
from tqexport.verification.samples import Labels, Samples, load_samples, random_samples
from tqexport.verification.sizes import of_other_sizes

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = [
    "Checked",
    "Samples",
    "check",
    "load_samples",
    "random_samples",
    "verify",
    "verify_made",
]

_CODES_ALONE = "codes alone"  # what stands for the runtime of a format that nothing here runs


@dataclass(frozen=True)
class Checked:
    """One artifact at one width, and how it compares with PyTorch.

    Attributes:
        file: Its name.
        bits: The width.
        runtime: What runs it, for people: ``onnxruntime``, ``LiteRT dynamic``, ``LiteRT switched``,
            ``LiteRT batch 8``.
        bytes: Size of the file.
        sha256: Hash of the bytes that were compared, hex.
        temporary: It was exported for this check alone.
        latency: Median seconds for one sample as deployed, on one thread; None where nothing here runs the format.
        deployed: The comparison with PyTorch, with the runtime's default optimisations, or XNNPACK.
        unoptimized: The same without them, layer by layer. Where nothing runs the format, both compare codes alone.
    """

    file: str
    bits: int
    runtime: str
    bytes: int
    sha256: str
    temporary: bool
    latency: float | None
    deployed: Verdict
    unoptimized: Verdict

    @property
    def passed(self) -> bool:
        """Whether the artifact equals PyTorch in both ways of running it."""
        return self.deployed.passed and self.unoptimized.passed

    @property
    def proved(self) -> bool:
        """Whether the parameters were compared; otherwise the verdict is of the samples alone."""
        return not self.unoptimized.parameters.startswith("not compared")

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one sentence each, that of the first layer first."""
        of_deployed = tuple(f"as deployed, {problem}" for problem in self.deployed.problems)
        # Without optimisations every layer is seen, so that what is wrong has its name.
        return self.unoptimized.problems or of_deployed

    @property
    def diverged(self) -> str | None:
        """The first layer that differs, if one does."""
        return self.unoptimized.diverged or self.deployed.diverged


def verify(
    project: Project, jobs: Sequence[Job], samples: Samples, runtimes: Collection[str] = ()
) -> Iterator[Checked]:
    """Compare files with PyTorch.

    Args:
        project: The checkpoint.
        jobs: What to compare; see :mod:`tqexport.verification.jobs`.
        samples: What to compare on.
        runtimes: Compare in these alone (``Backend.runtimes``); empty means in all that are here.

    Raises:
        HostError: A runtime is not installed.
        InputError: A file is damaged, or the checkpoint lacks its width.
    """
    fresh = FreshExports(project, _compared_with_fresh(jobs, project.model.info.widths))
    for number, job in enumerate(jobs, 1):
        with project.step(f"Comparing {job.file} at {job.bits} bits with PyTorch ({number} of {len(jobs)})"):
            with about(f"{job.file}:"):
                checked = list(check(project, job, samples, runtimes, fresh))
            yield from checked


def verify_made(
    project: Project,
    backend: Backend,
    kernel: str,
    files: Iterable[tuple[int, bytes]],
    samples: Samples,
    *,
    run_time: bool = False,
) -> Iterator[Checked]:
    """Compare files that were made of a network just now, whose parameters are its own, with PyTorch.

    Args:
        project: What they were made of.
        backend: Their format.
        kernel: How they multiply.
        files: Each width to compare at, with its file.
        samples: What to compare on.
        run_time: Whether they are run-time files.

    Raises:
        InputError: A runtime does not take a file.
        HostError: What runs them is not installed.
    """
    fresh = FreshExports(project, {})
    for bits, content in files:
        file = project.file_name(backend.name, project.widths if run_time else (bits,), kernel)
        job = Job(bits, backend, kernel, file, content, temporary=True, run_time=run_time)
        with project.step(f"Comparing {file} at {bits} bits with PyTorch"), about(f"{file}:"):
            checked = list(check(project, job, samples, (), fresh))
        yield from checked


def _compared_with_fresh(jobs: Sequence[Job], every_width: Sequence[int]) -> dict[FileKind, set[int]]:
    """By back end, kernel and batch, the widths of the fixed files that are needed to compare exported files with."""
    needed: dict[FileKind, set[int]] = {}
    for job in jobs:
        if job.temporary or is_integer(job.kernel):
            continue
        widths = every_width if job.run_time else (job.bits,)  # a run-time file is made from those of every width
        keys: list[FileKind] = [] if job.backend.converts is None else [(job.backend.converts, EXACT, None)]
        if not job.run_time:
            keys.append((job.backend.name, job.kernel, job.batch))
        elif job.backend.converts is None:
            keys.append((job.backend.name, EXACT, job.batch))
        for key in keys:
            needed.setdefault(key, set()).update(widths)
    return needed


def check(
    project: Project, job: Job, samples: Samples, runtimes: Collection[str], fresh: FreshExports
) -> Iterator[Checked]:
    """Compare one file: of the integer kernel in every runtime, of others as deployed and layer by layer.

    Args:
        project: The checkpoint.
        job: The file, and the width to compare it at.
        samples: What to compare on.
        runtimes: Compare in these alone; empty means in all that are here.
        fresh: What the checkpoint gives.

    Raises:
        HostError: A runtime is not installed.
        InputError: The file is damaged, or the checkpoint lacks its width.
    """
    programs = [runtime for runtime in runtimes if runtime in job.backend.programs]
    others = [runtime for runtime in runtimes if runtime in job.runtimes() and runtime not in programs]
    parameters = job.parameters(fresh)
    if is_integer(job.kernel):
        if others or not runtimes:
            yield from _check_integers(project, job, samples, others, parameters, job.opener(fresh))
        if programs:
            yield from _check_integers(project, job, samples, programs, parameters, job.backend)
        return
    if others or not runtimes:
        yield _check_floats(project, job, samples, parameters, job.opener(fresh).open_runner)
    for program in programs:
        open_program = functools.partial(job.backend.open_program, program)
        yield _check_floats(project, job, samples, parameters, open_program)


def _check_integers(
    project: Project, job: Job, samples: Samples, runtimes: Collection[str], parameters: Parameters, opener: Opener
) -> Iterator[Checked]:
    """Compare an integer file with the integer model, and that with PyTorch."""
    from tqexport.integer.build import integer_model
    from tqexport.verification.integers import IntegerComparison

    network_at = functools.lru_cache(functools.partial(integer_model, project.model))
    network = network_at(job.bits)
    open_integers = functools.partial(
        opener.open_integers, network_at=network_at, bits=job.bits, switched=job.run_time, runtimes=runtimes
    )
    opened = list(open_integers(parameters.content))
    # Values are looked at in a file with names that are known; the outputs are those of the very file that is given.
    given = list(open_integers(job.content)) if parameters.content != job.content else opened
    for runtime, as_given in zip(opened, given, strict=True):
        comparison = IntegerComparison(project.model, network, runtime, as_given, parameters)
        for inputs, labels in _batches(samples):
            comparison.add(inputs[0], labels)
        latency = as_given.latency(samples.inputs[0][:1])
        verdict = comparison.verdict()
        name = " ".join((verdict.runtime, *job.ways()))
        yield Checked(job.file, job.bits, name, len(job.content), job.sha256, job.temporary, latency, verdict, verdict)


def _check_floats(
    project: Project, job: Job, samples: Samples, parameters: Parameters, open_runner: Callable[..., Runner | None]
) -> Checked:
    """Compare a file as deployed, and layer by layer."""
    width = job.bits if job.run_time else None
    others = of_other_sizes(project.model) if job.has_free_sizes() else None
    runner, latency = open_runner(parameters.content, width, deployed=True), None
    if runner is None:
        comparison, runtime = job.comparison(project, parameters), _CODES_ALONE
        comparison.add_codes(job.backend.codes(job.content, job.bits))
        deployed = unoptimized = comparison.verdict()
    else:
        # Values are looked at in a file with names that are known; its outputs must be those of the file that is given.
        given = open_runner(job.content, width, deployed=True) if parameters.content != job.content else None
        deployed = _compare(job.comparison(project, parameters), runner, samples, others, given)
        latency = (given or runner).latency(tuple(values[:1] for values in samples.inputs))
        layer_by_layer = open_runner(parameters.content, width, deployed=False)
        unoptimized = (
            deployed
            if layer_by_layer is None
            else _compare(job.comparison(project, parameters), layer_by_layer, samples, others)
        )
        runtime = " ".join((deployed.runtime, *job.ways()))
    return Checked(
        job.file, job.bits, runtime, len(job.content), job.sha256, job.temporary, latency, deployed, unoptimized
    )


def _compare(
    comparison: Comparison, runner: Runner, samples: Samples, others: Samples | None, given: Runner | None = None
) -> Verdict:
    """Run the samples in batches and compare each batch, and those of other sizes.

    Args:
        comparison: What compares them.
        runner: The file.
        samples: What to run.
        others: Samples of other sizes, if the file takes any.
        given: The file whose outputs count, where it is another than that of ``runner``.
    """

    def run(inputs: Batch) -> RuntimeRun:
        found = runner.run(inputs)
        if given is None:
            return found
        return replace(found, outputs=dict(zip(found.outputs, given.run_untouched(inputs), strict=True)))

    for inputs, labels in _batches(samples):
        comparison.add(run(inputs), inputs, labels)
    if others is not None:
        comparison.add(run(others.inputs), others.inputs, counted=False)
    return comparison.verdict()


def _batches(samples: Samples) -> Iterator[tuple[Batch, Labels | None]]:
    """As many samples at once as memory should bear."""
    count = samples_at_once(sum(prod(values.shape[1:]) for values in samples.inputs))
    for start in range(0, len(samples), count):
        labels = None if samples.labels is None else samples.labels[start : start + count]
        yield tuple(values[start : start + count] for values in samples.inputs), labels


def samples_at_once(numbers: int) -> int:
    """How many samples of so many numbers to compare at once: outputs of all layers take a few hundred times that."""
    return max(2, min(64, 400_000 // numbers))
