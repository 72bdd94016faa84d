"""What is evaluated: artifacts, each at a width in a runtime, and the network itself in PyTorch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tqexport.artifacts.project import Project
from tqexport.backends import BACKENDS
from tqexport.backends.apart import BackendApart
from tqexport.backends.base import EXACT
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import HostError, InputError, about
from tqexport.files import temporary_folder
from tqexport.integer.names import is_integer
from tqexport.reading.apart import Apart
from tqexport.reading.files import read_bytes

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch
    from tqexport.integer.model import IntegerModel
    from tqexport.verification.jobs import Job

__all__ = ["PYTORCH", "Delivery", "Subject", "open_subject", "subjects_of"]

PYTORCH = "pytorch"  # the runtime of a checkpoint


@dataclass(frozen=True)
class Subject:
    """A file at a width in a runtime, whose answers are counted.

    Attributes:
        file: Its name.
        sha256: Hash of the file, hex.
        bits: The width.
        runtime: What runs it, as ``--runtime`` takes it.
        title: The same for people.
        backend: Name of its format; empty for a checkpoint.
        kernel: How it multiplies; empty for a checkpoint.
        run_time: Whether it is a run-time file.
    """

    file: str
    sha256: str
    bits: int
    runtime: str
    title: str
    backend: str = ""
    kernel: str = ""
    run_time: bool = False


@dataclass(frozen=True)
class Delivery:
    """What a worker gets once.

    Attributes:
        files: The content of each file by its SHA-256.
        networks: The integer models of integer files by width.
        options: How a checkpoint is read.
    """

    files: Mapping[str, bytes]
    networks: Mapping[int, IntegerModel]
    options: ReadOptions

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the hashes of all files and of what else is delivered, hex."""
        said = [*sorted(self.files), *sorted(self.networks), sorted(self.options.given().items())]
        return hashlib.sha256(repr(said).encode()).hexdigest()


def subjects_of(project: Project, widths: Sequence[int], runtimes: Collection[str]) -> tuple[list[Subject], Delivery]:
    """The subjects that a project gives, by width and runtime, and what a worker needs for them.

    Args:
        project: A checkpoint and its exports; files that are missing are made in memory, as for ``verify``.
        widths: The widths.
        runtimes: Evaluate in these alone; empty means in all that are here and run artifacts.

    Raises:
        UsageError: No file runs in any of ``runtimes``.
        HostError: A runtime is not installed.
        InputError: The checkpoint lacks a width, or an artifact is damaged or was changed.
    """
    from tqexport.integer.build import integer_model
    from tqexport.verification.jobs import jobs_of

    of_files = {*runtimes} - {PYTORCH}
    jobs = jobs_of(project, widths, of_files) if of_files or not runtimes else []
    subjects: list[Subject] = []
    files: dict[str, bytes] = {}
    networks: dict[int, IntegerModel] = {}
    for job in jobs:
        files[job.sha256] = job.content
        if is_integer(job.kernel) and not networks:  # a C file of several widths is compared with all of them
            networks = {bits: integer_model(project.model, bits) for bits in project.model.info.widths}
        for runtime, title in _runtimes_of(job, of_files).items():
            names = [title, *([] if is_integer(job.kernel) or job.kernel == EXACT else [job.kernel])]
            names += job.ways()
            subjects.append(
                Subject(
                    file=job.file,
                    sha256=job.sha256,
                    bits=job.bits,
                    runtime=runtime,
                    title=" ".join(names),
                    backend=job.backend.name,
                    kernel=job.kernel,
                    run_time=job.run_time,
                )
            )
    if PYTORCH in runtimes:
        files[project.model.sha256] = _checkpoint(project)
        for bits in widths:
            project.model.check_width(bits)
            subjects.append(Subject(project.checkpoint.name, project.model.sha256, bits, PYTORCH, "PyTorch"))
    subjects.sort(key=lambda subject: subject.bits)
    return subjects, Delivery(files, networks, project.options)


def _checkpoint(project: Project) -> bytes:
    """The file that the network of a project was read from.

    Raises:
        InputError: It is another by now.
    """
    content = read_bytes(project.checkpoint)
    if hashlib.sha256(content).hexdigest() != project.model.sha256:
        raise InputError(f"{project.checkpoint} was changed while this command ran; run it again")
    return content


def _runtimes_of(job: Job, chosen: Collection[str]) -> dict[str, str]:
    """The runtimes that an artifact is evaluated in, with what people call them."""
    known = {**job.backend.runtimes, **job.backend.integer_runtimes}
    usual = [name for name in known if name not in job.backend.programs]
    names = [name for name in known if name in job.runtimes() and name in (chosen or usual)]
    if not is_integer(job.kernel):  # as deployed; others that are no programs are how verify looks inside
        ways = [name for name in names if name in usual][:1] + [name for name in names if name not in usual]
        return {name: known[name] for name in ways}
    present = {}
    for name in names:
        try:
            job.backend.check_runtime(name)
        except HostError:
            if name in chosen:
                raise
        else:
            present[name] = known[name]
    return present


def open_subject(subject: Subject, delivery: Delivery, apart: Apart) -> Callable[[Batch], list[Array]]:
    """A subject ready to run.

    Args:
        subject: It.
        delivery: The files.
        apart: The process in which runtimes open them, so that a file which ends its runtime is a sentence.

    Returns:
        From samples (N, ...), an array for each input, channels first, to every output (N, ...).

    Raises:
        InputError: The runtime does not take the file.
        HostError: The runtime is not installed.
    """
    content = delivery.files[subject.sha256]
    if subject.runtime == PYTORCH:
        return _open_network(subject, content, delivery.options)
    backend = BACKENDS[subject.backend]
    backend.check_runtime(subject.runtime)
    # Programs are processes of their own. A C file runs only if it is, letter by letter, what the checkpoint gives.
    program = subject.runtime in backend.programs
    opener = BackendApart(apart, subject.backend) if backend.runtimes and not program else backend
    with about(f"{subject.file}:"):
        if is_integer(subject.kernel):
            opened = opener.open_integers(
                content,
                delivery.networks.__getitem__,
                subject.bits,
                switched=subject.run_time,
                runtimes=[subject.runtime],
            )
            (runtime,) = opened
            if runtime.differing:
                raise InputError(f"was changed since its export, first in {runtime.differing[0]}; export it again")
            # Levels are numbers in whose order classes are, not classes.
            return lambda batch: [runtime.run_untouched(batch[0]).astype(np.float32)]
        width = subject.bits if subject.run_time else None
        runner = (
            backend.open_program(subject.runtime, content, width)
            if program
            else opener.open_runner(content, width, deployed=True)
        )
        if runner is None:
            raise InputError("nothing here runs the format")
        return runner.run_untouched


def _open_network(subject: Subject, content: bytes, options: ReadOptions) -> Callable[[Batch], list[Array]]:
    """The network of a checkpoint in PyTorch, on one thread."""
    import torch

    from tqexport.checkpoints.checkpoint import load_checkpoint
    from tqexport.outputs import run_network

    with temporary_folder() as folder:
        copy = folder / subject.file
        copy.write_bytes(content)
        model = load_checkpoint(copy, options)

    def run(batch: Batch) -> list[Any]:
        with torch.no_grad(), model.at_width(subject.bits) as network:
            outputs = run_network(network, [torch.from_numpy(values) for values in batch])
        return [output.numpy() for output in outputs.values()]

    return run
