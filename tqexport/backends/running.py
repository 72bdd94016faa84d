"""Files open in their runtimes: what back ends give to applications and to verification."""

from __future__ import annotations

import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tqexport.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Batch = tuple[Array, ...]
    """Samples: an array (N, ...) for each input of a network, in its order."""

__all__ = [
    "Batch",
    "Runner",
    "RuntimeRun",
    "Session",
    "Stretches",
    "median_seconds",
    "other_orders",
]

_LATENCY_RUNS, _LATENCY_SECONDS = 30, 1.0


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
        traced_outputs: By name (N, ...), in the order of the network; of the copy of the file that also gave the
            activations.
        outputs: The same of the file itself.
    """

    runtime: str
    codes: Mapping[str, list[Array]]
    activations: Mapping[str, Array]
    values: Mapping[str, Array]
    traced_outputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    @property
    def output(self) -> Array:
        """The output of a network that has one, (N, ...)."""
        (output,) = self.outputs.values()
        return output


class Session(ABC):
    """A file open in its runtime, as an application runs it; arrays are in the layout of the file.

    Attributes:
        batch: How many samples the file takes at once; None for any number.
        input_names: Names of its inputs, without the one that chooses a width.
        output_names: Names of its outputs, in the order of :meth:`run`.
    """

    batch: int | None
    input_names: Sequence[str]
    output_names: Sequence[str]

    def run(self, batch: Batch) -> list[Array]:
        """Run any number of samples, in groups of as many as the file takes.

        Args:
            batch: An array (N, ...) for each input of the file.

        Returns:
            Every output of the file, (N, ...).

        Raises:
            InputError: The runtime does not run the file on them.
        """
        self.check(batch)
        size = self.batch
        if size is None:
            return self.run_group(*batch)
        from tqexport.backends.grouping import in_groups, put_together

        groups, counts = zip(*in_groups(batch, size), strict=True)
        columns = zip(*(self.run_group(*group) for group in groups), strict=True)
        return [put_together(parts, counts, size) for parts in columns]

    def check(self, batch: Batch) -> None:
        """Refuse another number of inputs than the file has, and different numbers of samples where it fixes these.

        Raises:
            InputError: They are not what the file takes.
        """
        names = self.input_names
        if len(batch) != len(names):
            raise InputError(f"the file takes {len(names)} inputs ({', '.join(names)}), not {len(batch)}")
        if self.batch is not None and len({len(values) for values in batch} | {0}) != 2:
            raise InputError(f"the inputs have {', '.join(str(len(values)) for values in batch)} samples")

    @abstractmethod
    def run_group(self, *group: Array) -> list[Array]:
        """Run as many samples as the file takes, an array for each input; returns every output as the file gives it.

        Raises:
            InputError: The runtime does not run the file on them.
        """


class Runner(ABC):
    """One artifact at one width, open in its runtime on one thread for verification; arrays are channels first.

    Attributes:
        runtime: Name of the runtime, for people.
    """

    runtime: ClassVar[str]

    def __init__(
        self, outputs: Sequence[str], activations: Sequence[str], values: Sequence[str], *, deployed: bool
    ) -> None:
        """Name what :meth:`run_traced` gives; see :meth:`Backend.open_runner`."""
        self._outputs, self._activations, self._values, self._deployed = outputs, activations, values, deployed

    def run(self, batch: Batch) -> RuntimeRun:
        """Run samples.

        Args:
            batch: An array (N, ...) for each input of the network.

        Raises:
            InputError: The runtime does not run the file on them.
        """
        codes, given = self.run_traced(batch)
        parts = iter(given)
        outputs, activations, values = (
            {name: next(parts) for name in names} for names in (self._outputs, self._activations, self._values)
        )
        # Without optimisations, keeping values does not change what is computed.
        untouched = dict(zip(self._outputs, self.run_untouched(batch), strict=True)) if self._deployed else outputs
        if not all(value.ndim and value.size for value in untouched.values()):
            raise InputError("gives an output without a number, so it was changed since its export")
        return RuntimeRun(self.runtime, codes, activations, values, outputs, untouched)

    @abstractmethod
    def run_traced(self, batch: Batch) -> tuple[dict[str, list[Array]], list[Array]]:
        """Run a copy of the file that gives its inner values, too.

        Returns:
            The codes as in :class:`RuntimeRun`; and the outputs, the activations and the other values, each (N, ...).
        """

    @abstractmethod
    def run_untouched(self, batch: Batch) -> list[Array]:
        """Outputs of the file itself, not of the copy that :meth:`run_traced` runs, (N, ...) each."""

    @property
    def batch(self) -> int | None:
        """How many samples the file takes at once; None for any number."""
        return None

    def latency(self, sample: Batch) -> float:
        """Median seconds that one sample (1, ...) takes: of a file of several samples at once, its share of them."""
        size = self.batch or 1
        return self._seconds(tuple(values.repeat(size, axis=0) for values in sample)) / size

    def _seconds(self, batch: Batch) -> float:
        """Median seconds that a batch takes, after one run to warm up."""
        return median_seconds(lambda: self.run_untouched(batch))


def median_seconds(run: Callable[[], object]) -> float:
    """Median wall time of a call in seconds, after one to warm up."""
    run()
    taken: list[float] = []
    while len(taken) < _LATENCY_RUNS and sum(taken) < _LATENCY_SECONDS:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def other_orders(value: Array, shape: Sequence[int]) -> Iterator[Array]:
    """A value in a shape of fewer axes, by every order in which a file may have had its axes before they were joined.

    A converter may move a rounding in front of a transposition and a reshape, as the heads of attention are put
    together by. The first axis, of the samples, stays where it is.
    """
    if value.ndim > len(shape):
        for axes in itertools.permutations(range(1, value.ndim)):
            yield value.transpose(0, *axes).reshape(shape)


class Stretches(Protocol):
    """An artifact that runs from one activation quantiser to the next, each stretch on activations that are given."""

    def __call__(self, batch: Batch, levels: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        """From inputs and the levels of each activation (N, ...) to outputs and, by activation, what it rounds."""
