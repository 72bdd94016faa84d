"""Verifying a project: finds or makes the artifacts, runs them on samples, and compares."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from tqexport.artifacts.project import Project
from tqexport.backends import BACKENDS, backend_of
from tqexport.backends.base import EXACT, Backend
from tqexport.backends.parameters import Parameters
from tqexport.backends.running import Runner, RuntimeRun
from tqexport.errors import InputError, UsageError, about
from tqexport.facts import ArtifactFacts, Facts
from tqexport.integer.names import is_integer
from tqexport.reading.files import read_bytes
from tqexport.verification.comparison import Comparison, Verdict
from tqexport.verification.fresh import FreshExports, Opener
from tqexport.verification.samples import Labels, Samples, load_samples, random_samples
from tqexport.verification.sizes import of_other_sizes

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = [
    "Checked",
    "Job",
    "Samples",
    "check",
    "jobs_of",
    "jobs_of_files",
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
        jobs: What to compare; see :func:`jobs_of` and :func:`jobs_of_files`.
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


@dataclass(frozen=True)
class Job:
    """One artifact at one of its widths.

    Attributes:
        bits: The width.
        backend: Its format.
        kernel: How it multiplies.
        file: Its name.
        content: The file.
        temporary: It was exported for this job alone.
        run_time: Whether it is a run-time file.
        batch: How many samples it takes at once.
    """

    bits: int
    backend: Backend
    kernel: str
    file: str
    content: bytes
    temporary: bool = False
    run_time: bool = False
    batch: int = 1

    @property
    def sha256(self) -> str:
        """Hash of the file, hex."""
        return hashlib.sha256(self.content).hexdigest()

    def place(self) -> tuple[int, str, bool, bool, int]:
        """Its place in the order of the results."""
        return self.bits, self.backend.name, self.kernel != EXACT, self.run_time, self.batch

    def runtimes(self) -> set[str]:
        """The runtimes that it runs in."""
        return self.backend.runtimes_of(self.kernel)

    def ways(self) -> list[str]:
        """What is said of it behind its runtime and kernel."""
        return ["switched"] * self.run_time + [f"batch {self.batch}"] * (self.batch > 1)

    def opener(self, fresh: FreshExports) -> Opener:
        """Who opens the file in its runtime."""
        if self.temporary:
            return self.backend
        return fresh.opener(self.backend.name, self.kernel, self.content, self.bits, switched=self.run_time)

    def comparison(self, project: Project, parameters: Parameters) -> Comparison:
        """The comparison with PyTorch at its width."""
        # A run-time file computes with float weights whatever the kernel of the files that are cut from it.
        return Comparison(project.model, self.bits, EXACT if self.run_time else self.kernel, parameters)

    def has_free_sizes(self) -> bool:
        """Whether sizes beside the batch have no number in the file."""
        inputs, _ = self.backend.describe(self.content)
        return any(isinstance(size, str) for tensor in inputs for size in tensor.shape[1:])

    def parameters(self, fresh: FreshExports) -> Parameters:
        """How its parameters compare with those that the checkpoint gives."""
        if self.temporary:
            return Parameters(self.content)  # it is what the checkpoint gives
        return fresh.compare(self.backend.name, self.kernel, self.content, self.bits, switched=self.run_time)


def jobs_of(project: Project, widths: Sequence[int], runtimes: Collection[str] = ()) -> list[Job]:
    """The artifacts of some widths, each at each of them, in the order of results.

    ONNX and TFLite files of widths that the project has not exported are made in memory; nothing is written. Other
    formats are compared where there are files of them.

    Args:
        project: The checkpoint and its exports.
        widths: The widths.
        runtimes: Those to compare in alone; empty means in all that are here.

    Raises:
        UsageError: No file runs in any of ``runtimes``.
        HostError: One of them is not installed.
        InputError: The checkpoint lacks a width, or an artifact is damaged or was changed.
        ConversionError: A width that was not exported cannot be.
    """
    backends = _backends_that_run_in(runtimes)
    return _that_run_in(runtimes, _found(project, widths, backends))


def jobs_of_files(
    project: Project, paths: Sequence[Path], widths: Sequence[int] = (), runtimes: Collection[str] = ()
) -> list[Job]:
    """Files that a user names, exported from the checkpoint and perhaps rewritten since, in the order of results.

    Args:
        project: The checkpoint.
        paths: The files.
        widths: Those to compare at; empty means all that each file has.
        runtimes: Those to compare in alone; empty means in all that are here.

    Raises:
        UsageError: A file has none of the widths, a width is of no file, two files have one name, or none runs in
            ``runtimes``.
        InputError: A file is missing, damaged, without its metadata, or of no kernel that the checkpoint has files of.
    """
    _backends_that_run_in(runtimes)
    named: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        if (other := named.setdefault(path.name, path)) is not path:
            raise UsageError(f"{other} and {path} have one name, so that results could be of either; rename one")
    jobs = [job for path in named.values() for job in _of_file(project, path, widths)]
    if missing := sorted({*widths} - {job.bits for job in jobs}):
        raise UsageError(f"no file has {_listed(missing)} bits; name the widths that they have with --bits")
    return _that_run_in(runtimes, jobs)


def _backends_that_run_in(runtimes: Collection[str]) -> list[Backend]:
    """The back ends whose files run in some of these, which are there; all back ends where none is named."""
    backends = [backend for backend in BACKENDS.values() if not runtimes or {*runtimes} & backend.every_runtime()]
    for backend in backends:
        for runtime in {*runtimes} & backend.every_runtime():
            backend.check_runtime(runtime)
    return backends


def _that_run_in(runtimes: Collection[str], jobs: Iterable[Job]) -> list[Job]:
    """Those of some jobs whose files run in some runtimes, in the order of results."""
    chosen = [job for job in sorted(jobs, key=Job.place) if not runtimes or {*runtimes} & job.runtimes()]
    if not chosen:
        raise UsageError(f"none of the files to compare runs in {', '.join(runtimes)}")
    return chosen


def _of_file(project: Project, path: Path, widths: Sequence[int]) -> Iterator[Job]:
    """A file that a user names, at each of its widths, or those of them that are asked for."""
    content = read_bytes(path)
    with about(str(path)):
        backend = backend_of(content)
        batch = backend.batch(content)
        kernels, run_time = _kernels(backend.facts(content))
        for kernel in dict.fromkeys(kernels.values()):
            if kernel not in backend.kernels or is_integer(kernel) != is_integer(project.default_kernel):
                raise InputError(
                    f"is of the kernel {kernel}, and no such {backend.title} file is made of {project.checkpoint}"
                )
    chosen = [bits for bits in kernels if not widths or bits in widths]
    if not chosen:
        raise UsageError(f"{path} has {_listed(kernels)} bits, not {_listed(widths)}; name others with --bits")
    for bits in chosen:
        project.model.check_width(bits)
        yield Job(bits, backend, kernels[bits], path.name, content, run_time=run_time, batch=batch)


def _kernels(facts: Facts) -> tuple[dict[int, str], bool]:
    """By width that a file runs at, how it multiplies; and whether it is a run-time file."""
    if isinstance(facts, ArtifactFacts):
        return {facts.width: facts.kernel or EXACT}, False
    widths = facts.widths if facts.own is None else (facts.own,)
    return {bits: facts.by_width[bits].kernel or EXACT for bits in widths}, facts.own is None


def _listed(widths: Iterable[int]) -> str:
    return ", ".join(map(str, widths))


def _compared_with_fresh(jobs: Sequence[Job], every_width: Sequence[int]) -> dict[tuple[str, str, int], set[int]]:
    """By back end, kernel and batch, the widths of the fixed files that are needed to compare exported files with."""
    needed: dict[tuple[str, str, int], set[int]] = {}
    for job in jobs:
        if job.temporary or is_integer(job.kernel):
            continue
        widths = every_width if job.run_time else (job.bits,)  # a run-time file is made from those of every width
        source = job.backend.converts or (job.backend.name if job.run_time else None)
        keys = [] if source is None else [(source, EXACT, 1)]  # no format that fixes the batch is converted from
        keys += [] if job.run_time else [(job.backend.name, job.kernel, job.batch)]
        for key in keys:
            needed.setdefault(key, set()).update(widths)
    return needed


def check(
    project: Project, job: Job, samples: Samples, runtimes: Collection[str], fresh: FreshExports
) -> Iterator[Checked]:
    """Compare one artifact: of the integer kernel in every runtime, of others as deployed and layer by layer."""
    programs = [runtime for runtime in runtimes if runtime in job.backend.programs]
    others = [runtime for runtime in runtimes if runtime in job.runtimes() and runtime not in programs]
    fresh = fresh.of_batch(job.batch)
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


def _found(project: Project, widths: Sequence[int], backends: Sequence[Backend]) -> Iterator[Job]:
    """The artifacts of each width; those that were exported come first, because one may turn out to be damaged."""
    exported: set[tuple[str, int]] = set()  # back ends and widths of which there is an exact file
    for artifact, content in project.artifacts(widths):
        run_time = len(artifact.widths) > 1
        for bits in sorted({*widths} & {*artifact.widths}):
            if artifact.kernel == project.default_kernel or (run_time and not is_integer(artifact.kernel)):
                exported.add((artifact.kind, bits))
            backend = BACKENDS[artifact.kind]
            yield Job(bits, backend, artifact.kernel, artifact.file, content, run_time=run_time, batch=artifact.batch)
    for bits in widths:
        project.model.check_width(bits)
    kernel = project.default_kernel
    names = [backend.name for backend in backends if backend.verified_by_default]
    missing = {name: [bits for bits in widths if (name, bits) not in exported] for name in names}
    chosen = [name for name in names if missing[name]]
    for name in chosen:
        BACKENDS[name].check_environment(kernel)
    for name in chosen:
        for bits, content in project.make(name, missing[name], kernel):
            yield Job(bits, BACKENDS[name], kernel, project.file_name(name, (bits,), kernel), content, temporary=True)
