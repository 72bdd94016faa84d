"""Verifying a project: finds or makes the artifacts, runs them on samples, and compares."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError
from tqexport.manifest import Kernel, Kind
from tqexport.parity import Verdict, compare, normalized
from tqexport.project import Project
from tqexport.runtimes import RuntimeRun, open_runner
from tqexport.trunc_model import TruncModel

Export = Callable[[Sequence[int]], Iterator[tuple[int, bytes]]]

__all__ = ["Checked", "Samples", "load_samples", "random_samples", "verify"]


@dataclass(frozen=True)
class Samples:
    """What the networks are compared on.

    Attributes:
        inputs: float32 (N, *input_shape), normalised.
        labels: Class of each sample (N,), if known.
        description: Where they come from, for people.
    """

    inputs: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None
    description: str


@dataclass(frozen=True)
class Checked:
    """One artifact and what was found.

    Attributes:
        file: Its name.
        bytes: Its size.
        temporary: It was exported for this check alone.
        verdict: The comparison with PyTorch.
    """

    file: str
    bytes: int
    temporary: bool
    verdict: Verdict


def random_samples(model: TruncModel, count: int, seed: int = 0) -> Samples:
    """Uniform noise in [0, 1], normalised as the network's real inputs are."""
    noise = np.random.default_rng(seed).random((count, *model.info.input_shape), np.float32)
    return Samples(normalized(model, noise), None, f"on {count} random samples")


def load_samples(path: Path, model: TruncModel) -> Samples:
    """Read samples from an NPZ file.

    Args:
        path: Holds ``inputs`` (N, *input_shape), before normalisation, and optionally ``labels`` (N,).
        model: The network that they are for.

    Raises:
        InputError: The file is missing or damaged, or its arrays do not fit the network.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; name an NPZ file with inputs and labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            inputs = np.asarray(file["inputs"], np.float32)
            labels = np.asarray(file["labels"], np.int64) if "labels" in file else None
    except KeyError as error:
        raise InputError(f"{path} holds no array named inputs") from error
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable NPZ file of numbers: {error}") from error
    if inputs.shape[1:] != model.info.input_shape or not len(inputs):
        raise InputError(f"{path}: inputs are {inputs.shape}, the network takes (N, {str(model.info.input_shape)[1:]}")
    if labels is not None and labels.shape != inputs.shape[:1]:
        raise InputError(f"{path}: labels are {labels.shape} for {len(inputs)} inputs")
    if not np.isfinite(inputs).all():
        raise InputError(f"{path}: inputs hold NaN or infinite values")
    return Samples(normalized(model, inputs), labels, f"on the {len(inputs)} samples of {path.name}")


def verify(project: Project, widths: Sequence[int], samples: Samples) -> Iterator[Checked]:
    """Compare the ONNX and the TFLite file of every width with PyTorch.

    Widths that the project has not exported are exported in memory; nothing is written.

    Raises:
        InputError: The checkpoint lacks a width, or an artifact is damaged or was changed.
        ConversionError: A width that was not exported cannot be.
    """
    jobs = sorted(_jobs(project, widths), key=lambda job: (job.bits, job.kind, job.kernel != "exact", job.run_time))
    for job in jobs:
        with project.step(f"Comparing {job.file} at {job.bits} bits with PyTorch"):
            try:
                run = job.run(samples.inputs)
            except InputError as error:
                raise InputError(f"{job.file}: {error}") from error
            verdict = compare(project.model, job.bits, run, samples.inputs, samples.labels, job.kernel)
        if job.run_time:
            verdict = replace(verdict, runtime=f"{verdict.runtime} switched")
        yield Checked(job.file, len(job.content), job.temporary, verdict)


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

    def run(self, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
        return open_runner(self.content, self.bits if self.run_time else None).run(inputs)


def _jobs(project: Project, widths: Sequence[int]) -> Iterator[_Job]:
    switched = project.run_time_files()
    for artifact, file in switched:
        content = file.read_bytes()
        for bits in sorted({*widths} & {*artifact.widths}):
            yield _Job(bits, artifact.kind, artifact.kernel, file.name, content, run_time=True)
    exporters: tuple[tuple[Kind, Export], ...] = (("onnx", project.onnx_bytes), ("tflite", project.tflite_bytes))
    for kind, export in exporters:
        missing = []
        for bits in widths:
            project.model.check_width(bits)
            if path := project.find(kind, bits):
                yield _Job(bits, kind, "exact", path.name, path.read_bytes())
            elif not any(a.kind == kind and bits in a.widths for a, _ in switched):
                missing.append(bits)
            if path := project.find(kind, bits, "dynamic"):
                yield _Job(bits, kind, "dynamic", path.name, path.read_bytes())
        for bits, content in export(missing) if missing else ():
            yield _Job(bits, kind, "exact", project.file_name(kind, (bits,)), content, temporary=True)
