"""What is to be compared with PyTorch: files of an export folder or named by a user, each at each of its widths."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqexport.artifacts.project import Project
from tqexport.backends import BACKENDS, backend_of
from tqexport.backends.base import EXACT, Backend
from tqexport.backends.parameters import Parameters
from tqexport.errors import InputError, UsageError, about
from tqexport.facts import ArtifactFacts, Facts
from tqexport.integer.names import is_integer
from tqexport.reading.files import read_bytes
from tqexport.verification.comparison import Comparison
from tqexport.verification.fresh import FreshExports, Opener

__all__ = ["Job", "jobs_of", "jobs_of_files"]


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
        batch: How many samples it takes at once; None for any number.
    """

    bits: int
    backend: Backend
    kernel: str
    file: str
    content: bytes
    temporary: bool = False
    run_time: bool = False
    batch: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the file, hex."""
        return hashlib.sha256(self.content).hexdigest()

    def place(self) -> tuple[int, str, bool, bool, int]:
        """Its place in the order of the results."""
        return self.bits, self.backend.name, self.kernel != EXACT, self.run_time, self.batch or 0

    def runtimes(self) -> set[str]:
        """The runtimes that it runs in."""
        return self.backend.runtimes_of(self.kernel)

    def ways(self) -> list[str]:
        """What is said of it behind its runtime and kernel."""
        fixed = self.batch not in (None, self.backend.ordinary_batch)
        return ["switched"] * self.run_time + [f"batch {self.batch}"] * fixed

    def opener(self, fresh: FreshExports) -> Opener:
        """Who opens the file in its runtime."""
        if self.temporary:
            return self.backend
        return fresh.opener(self.backend.name, self.kernel, self.content, self.bits, self.batch, switched=self.run_time)

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
        return fresh.compare(
            self.backend.name, self.kernel, self.content, self.bits, self.batch, switched=self.run_time
        )


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
