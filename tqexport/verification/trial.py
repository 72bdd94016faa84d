"""Which formats take a network, and the sentence of the refusal where one does not; before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqexport.artifacts.project import DEFAULT_FOLDER, Project
from tqexport.backends import BACKENDS
from tqexport.backends.base import EXACT, Backend
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import ConversionError, HostError, InputError, TqExportError, UsageError
from tqexport.integer.calibration import FEWEST_SAMPLES, calibrate
from tqexport.integer.capture import capture_calls
from tqexport.integer.grids import grids_of
from tqexport.integer.names import INTEGER
from tqexport.integer.plan import plan_of
from tqexport.model import TruncModel
from tqexport.verification.run import verify_made
from tqexport.verification.samples import noise

__all__ = ["Answer", "answers", "project_of"]

_SAMPLES = 4


@dataclass(frozen=True)
class Answer:
    """Whether a format takes a network.

    Attributes:
        format: Name of the back end.
        file: ``fixed``, a file for each width; or ``run-time``, one file for all of them.
        kernel: How the files multiply.
        taken: Whether it does, as far as was looked.
        certain: Whether files were made. Otherwise all that was looked at is what shows before a conversion.
        verified: Whether the files equal PyTorch; None where that was not asked.
        why: Why it is not taken, or what differs.
    """

    format: str
    file: str
    kernel: str
    taken: bool
    certain: bool = True
    verified: bool | None = None
    why: str = ""


def project_of(model: TruncModel, step: Callable[[str], AbstractContextManager[object]] = nullcontext) -> Project:
    """A network that no checkpoint holds as what back ends export from; nothing is written."""
    project = Project(Path("network"), DEFAULT_FOLDER, ReadOptions(), step=step)
    project.model = model
    return project


def answers(
    model: TruncModel,
    formats: Collection[str],
    *,
    convert: bool = False,
    step: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Iterator[Answer]:
    """Ask formats whether they take a network.

    A network with grids, and the formats that have nothing but integers, are asked for files of the integer kernel; its
    grids are found from random numbers.

    Args:
        model: The network; it need not be trained.
        formats: Names of back ends.
        convert: Make the files of every width and compare them with PyTorch, instead of looking at what shows before
            the slow part.
        step: Called with a sentence around everything slow.

    Yields:
        Two answers for each format; one where it has no file for several widths.

    Raises:
        HostError: A package or a compiler is missing.
    """
    exact, integers = project_of(model, step), _Integers(model, step)
    for name in formats:
        backend = BACKENDS[name]
        integer = EXACT not in backend.kernels or grids_of(model.module) is not None
        kernel = INTEGER if integer else EXACT
        for run_time in (False, True):
            file = "run-time" if run_time else "fixed"
            try:
                if integer and (doubt := integers.doubt):
                    yield Answer(name, file, kernel, taken=True, certain=False, why=doubt)
                    continue
                project = integers.project if integer else exact
                if convert:
                    yield _converted(project, backend, kernel, run_time=run_time)
                else:
                    with step(f"Asking {backend.title}"):
                        certain = backend.check_network(project, kernel, run_time=run_time)
                    yield Answer(name, file, kernel, taken=True, certain=certain)
            except HostError:
                raise
            except UsageError as error:
                if not run_time:
                    yield Answer(name, file, kernel, taken=False, why=str(error))
            except TqExportError as error:
                yield Answer(name, file, kernel, taken=False, why=str(error))


def _converted(project: Project, backend: Backend, kernel: str, *, run_time: bool) -> Answer:
    """Make the files, and compare them with PyTorch."""
    backend.check_environment(kernel)
    widths = project.widths
    if run_time:
        content = backend.export_runtime(project, kernel)
        files = [(bits, content) for bits in widths]
    else:
        files = [*project.make(backend.name, widths, kernel)]
    info = project.model.info
    samples = noise(_SAMPLES, info.signature).normalized(info.normalization)
    checked = list(verify_made(project, backend, kernel, files, samples, run_time=run_time))
    wrong = [f"at {each.bits} bits, in {each.runtime}: {each.problems[0]}" for each in checked if not each.passed]
    why = f"the file differs from PyTorch {wrong[0]}" if wrong else ""
    file = "run-time" if run_time else "fixed"
    return Answer(backend.name, file, kernel, taken=not wrong, verified=not wrong, why=why)


class _Integers:
    """The network with grids, found when first asked for."""

    def __init__(self, model: TruncModel, step: Callable[[str], AbstractContextManager[object]]) -> None:
        self._model, self._step = model, step
        self._project: Project | None = None
        self._refusal: InputError | None = None
        self._doubt = ""

    @property
    def project(self) -> Project:
        """What back ends export its integers from.

        Raises:
            ConversionError: It has no integer form.
        """
        self._find()
        if self._project is None:
            assert self._refusal is not None
            raise self._refusal
        return self._project

    @property
    def doubt(self) -> str:
        """Why no grids were found where the network has an integer form; empty where they were, or it has none."""
        self._find()
        return self._doubt

    def _find(self) -> None:
        if self._project or self._refusal or self._doubt:
            return
        info = self._model.info
        try:
            with self._step("Finding grids for integers"):
                with self._model.at_width(info.widths[0]) as network:
                    plan_of(capture_calls(network, info.input_shape))
                samples = noise(FEWEST_SAMPLES, info.signature).inputs[0]
                self._project = project_of(calibrate(self._model, samples), self._step)
        except ConversionError as error:
            self._refusal = ConversionError(
                f"{error}; replace it, or use the {EXACT} kernel of ONNX or TFLite, which needs no integer form"
            )
        except InputError as error:  # of grids that random numbers and weights give
            self._doubt = f"the network has an integer form, but no grids with random weights: {error}"
