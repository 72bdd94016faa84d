"""Verifying a project: finds or makes the artifacts, runs them on samples, and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from tqexport.artifacts.manifest import Kernel, Kind
from tqexport.artifacts.project import Project, check_converter
from tqexport.errors import InputError
from tqexport.verification.parity import Comparison, Verdict
from tqexport.verification.runtimes import Runner, open_runner
from tqexport.verification.samples import Samples, load_samples, random_samples

__all__ = ["Checked", "Samples", "load_samples", "random_samples", "verify"]

Export = Callable[[Sequence[int]], Iterator[tuple[int, bytes]]]


@dataclass(frozen=True)
class Checked:
    """One artifact at one width, and what was found.

    Attributes:
        file: Its name.
        bits: The width.
        runtime: What runs it, for people: ``onnxruntime``, ``LiteRT dynamic``, ``LiteRT switched``.
        bytes: Size of the file.
        temporary: It was exported for this check alone.
        latency: Median seconds for one sample as deployed, on one thread.
        deployed: The comparison with PyTorch, with the runtime's default optimisations, or XNNPACK.
        unoptimized: The same without them, layer by layer.
    """

    file: str
    bits: int
    runtime: str
    bytes: int
    temporary: bool
    latency: float
    deployed: Verdict
    unoptimized: Verdict

    @property
    def passed(self) -> bool:
        """Whether the artifact equals PyTorch in both ways of running it."""
        return self.deployed.passed and self.unoptimized.passed

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


def verify(project: Project, widths: Sequence[int], samples: Samples) -> Iterator[Checked]:
    """Compare the ONNX and the TFLite files of every width with PyTorch.

    Widths that the project has not exported are exported in memory; nothing is written.

    Raises:
        InputError: The checkpoint lacks a width, or an artifact is damaged or was changed.
        ConversionError: A width that was not exported cannot be.
    """
    jobs = sorted(_jobs(project, widths), key=lambda job: (job.bits, job.kind, job.kernel != "exact", job.run_time))
    for number, job in enumerate(jobs, 1):
        with project.step(f"Comparing {job.file} at {job.bits} bits with PyTorch ({number} of {len(jobs)})"):
            try:
                yield _check(project, job, samples)
            except InputError as error:
                raise InputError(f"{job.file}: {error}") from error


@dataclass(frozen=True)
class _Job:
    """One artifact at one of its widths."""

    bits: int
    kind: Kind
    kernel: Kernel
    file: str
    content: bytes
    temporary: bool = False
    run_time: bool = False

    def open(self, *, deployed: bool) -> Runner:
        return open_runner(self.content, self.bits if self.run_time else None, deployed=deployed)


def _check(project: Project, job: _Job, samples: Samples) -> Checked:
    runner = job.open(deployed=True)
    deployed = _compare(project, job, runner, samples)
    latency = runner.latency(samples.inputs[:1])
    # A run-time file computes with float weights whatever the kernel of the files that are cut from it.
    unoptimized = _compare(project, job, job.open(deployed=False), samples)
    runtime = f"{deployed.runtime} switched" if job.run_time else deployed.runtime
    return Checked(job.file, job.bits, runtime, len(job.content), job.temporary, latency, deployed, unoptimized)


def _compare(project: Project, job: _Job, runner: Runner, samples: Samples) -> Verdict:
    comparison = Comparison(project.model, job.bits, "exact" if job.run_time else job.kernel)
    count = samples_at_once(samples.inputs.shape[1:])
    for start in range(0, len(samples.inputs), count):
        inputs = samples.inputs[start : start + count]
        labels = None if samples.labels is None else samples.labels[start : start + count]
        comparison.add(runner.run(inputs), inputs, labels)
    return comparison.verdict()


def samples_at_once(input_shape: Sequence[int]) -> int:
    """How many samples to keep every layer's output of; they take a few hundred times the memory of the inputs."""
    return max(2, min(64, 400_000 // prod(input_shape)))


def _jobs(project: Project, widths: Sequence[int]) -> Iterator[_Job]:
    """The artifacts of each width; those that are there first, because one may turn out to be damaged."""
    switched = project.run_time_files()
    missing: dict[Kind, list[int]] = {"onnx": [], "tflite": []}
    for artifact, file in switched:
        content = file.read_bytes()
        for bits in sorted({*widths} & {*artifact.widths}):
            yield _Job(bits, artifact.kind, artifact.kernel, file.name, content, run_time=True)
    for kind, absent in missing.items():
        for bits in widths:
            if path := project.find(kind, bits):
                yield _Job(bits, kind, "exact", path.name, path.read_bytes())
            elif not any(a.kind == kind and bits in a.widths for a, _ in switched):
                absent.append(bits)
            if path := project.find(kind, bits, "dynamic"):
                yield _Job(bits, kind, "dynamic", path.name, path.read_bytes())
    for bits in widths:
        project.model.check_width(bits)
    if missing["tflite"]:
        check_converter()
    exporters: dict[Kind, Export] = {"onnx": project.onnx_bytes, "tflite": project.tflite_bytes}
    for kind, absent in missing.items():
        for bits, content in exporters[kind](absent) if absent else ():
            yield _Job(bits, kind, "exact", project.file_name(kind, (bits,)), content, temporary=True)
