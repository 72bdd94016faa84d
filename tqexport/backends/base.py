"""What every back end can do: the seam between networks and file formats.

A back end is a folder in ``tqexport/backends/`` and one entry in :mod:`tqexport.backends`. Everything else in the
package (export folder, truncation, verification, commands) knows this protocol alone. tests/backends/conformance.py is
the suite that every back end passes; docs/architecture.md shows how one is added.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tqexport.errors import UsageError
from tqexport.facts import Facts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tqexport.integer.model import IntegerModel
    from tqexport.integer.runtime import IntegerRuntime
    from tqexport.model import TruncModel

    Array = npt.NDArray[Any]
    Inputs = npt.NDArray[np.float32]

__all__ = ["EXACT", "Backend", "Runner", "RuntimeRun", "Session", "Source", "Stretches", "TensorInfo", "median_seconds"]

EXACT = "exact"  # the kernel that every back end has: it computes what PyTorch computes, up to float32 rounding

_LATENCY_RUNS, _LATENCY_SECONDS = 30, 1.0


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an artifact; the batch dimension is the string ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class RuntimeRun:
    """What a runtime computed for N samples.

    Attributes:
        runtime: Its name, for people.
        codes: By weight name, each place where the file holds it: the uint8 codes 0 to ``M_b`` that the runtime
            shifted, or the integers that a file stores in the place of codes, in PyTorch's axis order.
        activations: By ``<module>/Round``: whole-number levels 0 to ``M_a``, float32 (N, ...) channels first.
        values: Outputs of layers and other inner values, by name in the file, float32 (N, ...) channels first. ONNX
            files name them after the modules. Empty for a file as deployed, which fuses layers.
        traced_outputs: float32 (N, ...), of the copy of the file that also gave the activations.
        outputs: float32 (N, ...), of the file itself.
    """

    runtime: str
    codes: Mapping[str, list[Array]]
    activations: Mapping[str, Array]
    values: Mapping[str, Array]
    traced_outputs: Array
    outputs: Array


class Session(ABC):
    """A file open in its runtime, as an application runs it; arrays are in the layout of the file."""

    @abstractmethod
    def run(self, batch: Inputs, given: Mapping[str, Array] = {}) -> list[Array]:
        """Run samples.

        Args:
            batch: float32 (N, ...).
            given: Values of further inputs by name, (N, ...).

        Returns:
            Every output of the file, (N, ...).

        Raises:
            InputError: The runtime does not run the file on them.
        """


class Runner(ABC):
    """One artifact at one width, open in its runtime on one thread for verification; arrays are channels first.

    Attributes:
        runtime: Name of the runtime, for people.
    """

    runtime: ClassVar[str]

    def __init__(self, activations: Sequence[str], values: Sequence[str], *, deployed: bool) -> None:
        """Name the activations and the other values that :meth:`run_traced` gives; see :meth:`Backend.open_runner`."""
        self._activations, self._values, self._deployed = activations, values, deployed

    def run(self, inputs: Inputs) -> RuntimeRun:
        """Run samples.

        Args:
            inputs: float32 (N, ...).

        Raises:
            InputError: The runtime does not run the file on them.
        """
        codes, (outputs, *inside) = self.run_traced(inputs)
        activations = dict(zip(self._activations, inside, strict=False))
        values = dict(zip(self._values, inside[len(self._activations) :], strict=True))
        # Without optimisations, keeping values does not change what is computed.
        untouched = self.run_untouched(inputs) if self._deployed else outputs
        return RuntimeRun(self.runtime, codes, activations, values, outputs, untouched)

    @abstractmethod
    def run_traced(self, inputs: Inputs) -> tuple[dict[str, list[Array]], list[Array]]:
        """Run a copy of the file that gives its inner values, too.

        Returns:
            The codes as in :class:`RuntimeRun`; and the outputs, the activations and the other values, each (N, ...).
        """

    @abstractmethod
    def run_untouched(self, inputs: Inputs) -> Array:
        """Outputs of the file itself, not of the copy that :meth:`run_traced` runs, (N, ...)."""

    def latency(self, sample: Inputs) -> float:
        """Median seconds that one sample (1, ...) takes, after one run to warm up."""
        return median_seconds(lambda: self.run_untouched(sample))


def median_seconds(run: Callable[[], object]) -> float:
    """Median wall time of a call in seconds, after one to warm up."""
    run()
    taken: list[float] = []
    while len(taken) < _LATENCY_RUNS and sum(taken) < _LATENCY_SECONDS:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


class Stretches(Protocol):
    """An artifact that runs from one activation quantiser to the next, each stretch on activations that are given."""

    def __call__(self, inputs: Inputs, levels: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """From inputs and the levels of each activation (N, ...) to outputs and, by activation, what it rounds."""


class Source(Protocol):
    """What a back end exports from: a checkpoint, and the files of other back ends that were made of it."""

    @property
    def model(self) -> TruncModel:
        """The reference network."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that the checkpoint has, ascending."""

    def fixed_files(self, backend: str, widths: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Fixed files of another back end, as they were exported or made now."""

    def step(self, text: str, /) -> AbstractContextManager[object]:
        """Says what goes on while something slow runs."""


class Backend(ABC):
    """A file format that networks are exported to.

    Attributes:
        name: The format's name: of the command, in the manifest, and as the ending of its files.
        title: What people call it.
        layout: ``channels first`` or ``channels last``, of inputs and outputs.
        description: What the command's help says of its files.
        kernels: The ways in which its files can multiply, by name, with a word on each for the command's help.
        verified_by_default: Whether ``verify`` makes a file for the check where there is none.
        runtimes: What runs its files here, by the name that ``verify --runtime`` takes, with what people call it.
        integer_runtimes: What runs its integer files besides.
        converts: The back end whose files it makes its own from; None where it starts from the network.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layout: ClassVar[str]
    description: ClassVar[str]
    kernels: ClassVar[Mapping[str, str]] = {EXACT: ""}
    verified_by_default: ClassVar[bool] = False
    runtimes: ClassVar[Mapping[str, str]] = {}
    integer_runtimes: ClassVar[Mapping[str, str]] = {}
    converts: ClassVar[str | None] = None

    def every_runtime(self) -> set[str]:
        """Names of all runtimes of its files, whatever the kernel."""
        return {*self.runtimes, *self.integer_runtimes}

    def check_environment(self, kernel: str = EXACT) -> None:  # noqa: B027 - most back ends need nothing more
        """Make sure that what an export needs is there, before any slow work.

        Raises:
            HostError: A package is missing.
        """

    def check_runtime(self, runtime: str) -> None:  # noqa: B027 - most runtimes are there with the package
        """Make sure that a runtime is there.

        Raises:
            HostError: It is not installed.
        """

    # Making files. Each width of a network is a fixed file; some formats can hold several widths in one.

    @abstractmethod
    def export(self, source: Source, widths: Sequence[int], kernel: str = EXACT) -> Iterator[tuple[int, bytes]]:
        """Fixed files of some widths. The same checkpoint gives the same bytes.

        Raises:
            InputError: The checkpoint lacks a width.
            ConversionError: The network cannot be exported to this format.
        """

    def export_runtime(self, source: Source, kernel: str = EXACT) -> bytes:  # noqa: ARG002 - of those that can
        """One file for every width of the checkpoint, chosen as it runs.

        Raises:
            UsageError: The format has no such file.
            InputError: The codes of the network cannot be shifted, or its widths do not share one graph.
            ConversionError: The network cannot be exported to this format.
        """
        raise UsageError(f"one {self.title} file cannot hold several widths; name the widths to export")

    def export_truncatable(self, source: Source, widths: Sequence[int]) -> Iterator[tuple[int, bytes]]:  # noqa: ARG002
        """Fixed files that other widths can be cut from.

        Raises:
            UsageError: The format has no such file.
            InputError: The codes of the network cannot be shifted, or its widths do not share one graph.
        """
        raise UsageError(
            f"a {self.title} file of one width cannot hold others; a file for all widths (--bits runtime) gives every "
            "one of them with tqexport truncate, and so does an ONNX file made with --truncatable"
        )

    # Reading files.

    @abstractmethod
    def recognises(self, content: bytes) -> bool:
        """Whether a file's content is of this format, from its first bytes."""

    @abstractmethod
    def describe(self, content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        """Inputs and outputs of a file.

        Raises:
            InputError: It is damaged.
        """

    @abstractmethod
    def facts(self, content: bytes) -> Facts:
        """What a file says of itself.

        Raises:
            InputError: It is damaged, or tqexport did not write it.
        """

    @abstractmethod
    def codes(self, content: bytes, bits: int) -> dict[str, list[Array]]:
        """The codes that a file stores, at one of its widths; see :class:`RuntimeRun`. Nothing is run.

        Raises:
            InputError: It is damaged, or holds none.
        """

    def cut(self, content: bytes, bits: int) -> bytes:
        """The fixed file of a width from a file with several, byte for byte as a direct export makes it.

        Raises:
            InputError: It is damaged. (Whether it has the width was asked before, and the result is proved after.)
        """
        raise NotImplementedError(f"{self.title} files hold one width each")

    def open_integers(self, content: bytes, network: IntegerModel, *, switched: bool) -> Iterator[IntegerRuntime]:  # noqa: ARG002
        """A file of the integer kernel in every runtime that is here, ready to be verified.

        Args:
            content: The file.
            network: The integer model that it must be.
            switched: Whether it is a run-time file.

        Raises:
            InputError: A runtime does not take the file.
        """
        return iter(())

    # Running files. A format that nothing here can run leaves these as they are; its codes are verified all the same.

    def open_session(self, content: bytes, *, threads: int = 1) -> Session | None:  # noqa: ARG002
        """A fixed file ready to run as an application runs it, or None where nothing here runs the format.

        Raises:
            InputError: The runtime does not take the file.
        """
        return None

    def open_runner(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner | None:  # noqa: ARG002
        """A file ready to be verified, or None where nothing here runs the format.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.
            deployed: With the optimisations that the runtime makes by default. Otherwise without, and with the output
                of every layer kept.

        Raises:
            InputError: The runtime does not take the file, or the file lacks the width.
        """
        return None

    def open_stretches(self, content: bytes, bits: int | None, activations: Collection[str]) -> Stretches | None:  # noqa: ARG002
        """A file cut at its activation quantisers, or None where nothing here runs the format.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.
            activations: Which roundings to cut at, by name (``<module>/Round``).

        Raises:
            InputError: The runtime does not take the file.
        """
        return None
