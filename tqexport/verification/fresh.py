"""What the checkpoint gives: exports made anew, whatever the export folder holds, to compare its files with."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tqexport.artifacts.project import Project
from tqexport.backends import BACKENDS
from tqexport.backends.apart import BackendApart
from tqexport.backends.base import EXACT, Backend, is_exact
from tqexport.backends.parameters import Parameters
from tqexport.errors import ConversionError, HostError, InputError, UsageError
from tqexport.integer.names import is_integer
from tqexport.reading.apart import Apart
from tqexport.verification.samples import noise
from tqexport.verification.trace import furthest_apart

if TYPE_CHECKING:
    from tqexport.backends.running import Batch
    from tqexport.model import TruncModel

__all__ = ["FileKind", "FreshExports"]

Opener = Backend | BackendApart

_SAMPLES = 16  # to run continuous files on; every parameter has an effect on each
# How far apart outputs without roundings of activations may be, as a share of the largest: so many times what the last
# bit of the inputs changes, and within these. Of 25 networks the last bit of every constant changed 13 times as much at
# most, and 3e-7 to 8e-6; a value that is off by 1e-4 in one place of ResNet-8 changes 2e-5 at least.
_TIMES, _LEAST, _MOST = 20, 4e-6, 1e-4


FileKind: TypeAlias = tuple[str, str, int | None]
"""Back end, kernel and number of samples at once of files; None for as many as files of the format do ordinarily."""


class FreshExports:
    """Files of a project's checkpoint, each made once and when it is first asked for.

    It is the source that back ends export from, so that none of them reads a file of the export folder.
    """

    def __init__(self, project: Project, wanted: Mapping[FileKind, Collection[int]]) -> None:
        """Plan what will be asked for, so that what is converted together is converted once.

        Args:
            project: The checkpoint.
            wanted: The widths of the fixed files that will be needed, by what they are.
        """
        self._project = project
        self._wanted = {_key(*kind): widths for kind, widths in wanted.items()}
        self._fixed: dict[tuple[FileKind, int], bytes] = {}
        self._run_time: dict[FileKind, bytes] = {}
        self._apart = Apart()

    @property
    def model(self) -> TruncModel:
        """The reference network."""
        return self._project.model

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that the checkpoint has, ascending."""
        return self.model.info.widths

    def step(self, text: str, /) -> AbstractContextManager[object]:
        """Says what goes on while something slow runs."""
        return self._project.step(text)

    def file_name(self, backend: str, widths: Sequence[int], kernel: str = EXACT) -> str:
        """What the file of a back end is called."""
        return self._project.file_name(backend, widths, kernel)

    def fixed_files(self, backend: str, widths: Sequence[int], batch: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Fixed files, for another back end to convert or for a file of several widths."""
        for bits in widths:
            yield bits, self.fixed(backend, EXACT, bits, batch, widths)

    def fixed(
        self, backend: str, kernel: str, bits: int, batch: int | None = None, widths: Collection[int] = ()
    ) -> bytes:
        """The fixed file of a width.

        Args:
            backend: Name of the back end.
            kernel: One of its kernels.
            bits: The width.
            batch: How many samples it takes at once; None for as many as files of the format do ordinarily.
            widths: Others that are made with it.

        Raises:
            HostError: A package is missing.
            ConversionError: The network cannot be exported to this format.
        """
        key = _key(backend, kernel, batch)
        if (key, bits) not in self._fixed:
            together = sorted({bits, *widths, *self._wanted.get(key, ())})
            missing = [width for width in together if (key, width) not in self._fixed]
            BACKENDS[backend].check_environment(kernel)
            with _silently():
                for width, content in BACKENDS[backend].export(self, missing, kernel, batch):
                    self._fixed[key, width] = content
        return self._fixed[key, bits]

    def run_time(self, backend: str, kernel: str, batch: int | None = None) -> bytes:
        """The run-time file; raises as :meth:`fixed`."""
        key = _key(backend, kernel, batch)
        if key not in self._run_time:
            BACKENDS[backend].check_environment(kernel)
            with _silently():
                self._run_time[key] = BACKENDS[backend].export_runtime(self, kernel, batch)
        return self._run_time[key]

    def _expected(self, backend: str, kernel: str, bits: int, batch: int | None, *, switched: bool) -> bytes:
        """The fixed file of a width, or the run-time file; raises as :meth:`fixed`."""
        return self.run_time(backend, kernel, batch) if switched else self.fixed(backend, kernel, bits, batch)

    def opener(
        self, backend: str, kernel: str, content: bytes, bits: int, batch: int | None = None, *, switched: bool
    ) -> Opener:
        """Who opens a file in its runtime: its back end, or that in a process of its own where it is not untouched.

        Args:
            backend: Name of its back end.
            kernel: How it multiplies.
            content: The file.
            bits: The width to run at.
            batch: How many samples it takes at once; None for any number.
            switched: Whether it is a run-time file.
        """
        if not BACKENDS[backend].runtimes:
            return self.apart(backend)
        try:
            untouched = content == self._expected(backend, kernel, bits, batch, switched=switched)
        except (HostError, InputError, UsageError):  # nothing to compare with
            untouched = False
        return BACKENDS[backend] if untouched else self.apart(backend)

    def apart(self, backend: str) -> Opener:
        """A back end that opens files in a process of its own, or as it is where nothing here runs its files.

        C files are run where nothing in them differs from a fresh export, and not at all where something does.
        """
        return BackendApart(self._apart, backend) if BACKENDS[backend].runtimes else BACKENDS[backend]

    def compare(
        self, backend: str, kernel: str, content: bytes, bits: int, batch: int | None = None, *, switched: bool
    ) -> Parameters:
        """Compare the parameters of a file with those that the checkpoint gives.

        Args:
            backend: Name of its back end.
            kernel: How it multiplies.
            content: The file.
            bits: The width to compare at.
            batch: How many samples it takes at once; None for any number.
            switched: Whether it is a run-time file.

        Raises:
            InputError: The file is damaged.
        """
        try:
            fresh = self._expected(backend, kernel, bits, batch, switched=switched)
        except (HostError, ConversionError) as error:  # this machine makes none, which is no fault of the file
            return Parameters(content, not_compared=f"no fresh export could be made, because {error}")
        except (InputError, UsageError) as error:
            text = f"the kernel: no {kernel} file is made of the checkpoint at {bits} bits, because {error}"
            return Parameters(content, {"the kernel": text})
        found = BACKENDS[backend].compare_parameters(content, fresh, bits, switched=switched)
        if found.not_compared is None or found.differences:
            return found
        if is_integer(kernel) or (not switched and not is_exact(kernel)):
            text = (
                f"the structure: it is another than tqexport gives files of the kernel {kernel}, whose own rounding "
                "hides small changes, so nothing proves the file right; export it again"
            )
            return Parameters(content, {"the structure": text}, found.not_compared)
        width = bits if switched else None
        apart, explained = _apart((self.apart(backend), BACKENDS[backend]), (content, fresh), width, self._samples())
        if apart <= explained:
            return found
        text = (
            f"the outputs: where activations are not rounded, they are off by {apart:.1e} of the largest from those of "
            f"a fresh export, which float rounding explains up to {explained:.1e}, so the file was changed to compute "
            "something else"
        )
        return Parameters(content, {"the outputs": text}, found.not_compared)

    def _samples(self) -> Batch:
        """A few samples, normally distributed; of inputs of whole numbers, those that they take."""
        generator = np.random.default_rng(0)
        drawn = noise(_SAMPLES, self.model.info.signature).inputs
        return tuple(
            generator.standard_normal(values.shape, np.float32) if values.dtype == np.float32 else values
            for values in drawn
        )


def _key(backend: str, kernel: str, batch: int | None) -> FileKind:
    """What files are kept by, besides their widths."""
    return backend, kernel, batch or BACKENDS[backend].ordinary_batch


@contextmanager
def _silently() -> Iterator[None]:
    """Without what an export warns of, which was said when the file was exported; with ``--verbose`` all is said."""
    logger = logging.getLogger("tqexport")
    level = logger.level
    logger.setLevel(level if logger.isEnabledFor(logging.DEBUG) else logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _apart(
    openers: tuple[Opener, Opener], files: tuple[bytes, bytes], bits: int | None, batch: Batch
) -> tuple[float, float]:
    """How far two files are apart without roundings, as a share of the largest output, and how far they may be.

    Both are 0 if nothing runs them.
    """
    runs = [opener.open_continuous(content, bits) for opener, content in zip(openers, files, strict=True)]
    own, fresh = runs
    if own is None or fresh is None:
        return 0.0, 0.0
    expected = fresh(batch)
    nudged = tuple(np.nextafter(x, np.float32(np.inf)) if x.dtype == np.float32 else x for x in batch)
    explained = _TIMES * furthest_apart(fresh(nudged), expected)
    return furthest_apart(own(batch), expected), min(max(explained, _LEAST), _MOST)
