"""An integer file open in a runtime: the seam between the back ends and the verification of integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from tqexport.backends.running import median_seconds
from tqexport.integer.arithmetic import Rounding
from tqexport.reading.apart import Opened

__all__ = ["IntegerRun", "IntegerRuntime", "IntegerRuntimeApart"]

Levels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class IntegerRun:
    """What a runtime computed for N samples.

    Attributes:
        values: By name in the integer model, the values that the runtime gave, uint8 levels (N, ...) channels first.
        outputs: Levels of the untouched file's outputs, (N, ...).
    """

    values: Mapping[str, Levels]
    outputs: Levels


class IntegerRuntime(ABC):
    """One integer file at one width, open in one runtime.

    Attributes:
        key: The runtime, as ``verify --runtime`` takes it.
        name: The runtime, for people.
        rounding: How it rounds.
        differing: Parts of the file that are not those of a fresh export, for which it was not run. A file that the
            runtime takes is never code, and has none: its parameters are compared before.
    """

    key: str
    name: str
    rounding: Rounding
    differing: tuple[str, ...] = ()

    @abstractmethod
    def run(self, inputs: npt.NDArray[np.float32]) -> IntegerRun:
        """Run samples, float32 (N, *input_shape) channels first.

        Raises:
            InputError: The runtime does not run the file on them.
        """

    @abstractmethod
    def run_untouched(self, inputs: npt.NDArray[np.float32]) -> Levels:
        """Levels of the outputs of the file as it is, (N, ...)."""

    @property
    def batch(self) -> int | None:
        """How many samples the file takes at once; None for any number."""
        return None

    def latency(self, sample: npt.NDArray[np.float32]) -> float:
        """Median seconds that one sample (1, ...) takes: of a file of several samples at once, its share of them."""
        size = self.batch or 1
        return self._seconds(np.repeat(sample, size, axis=0)) / size

    def _seconds(self, batch: npt.NDArray[np.float32]) -> float:
        """Median seconds that a batch takes, after one run to warm up."""
        return median_seconds(lambda: self.run_untouched(batch))


class IntegerRuntimeApart(IntegerRuntime):
    """One integer file in one of the runtimes that :class:`tqexport.backends.apart.BackendApart` opened it in."""

    def __init__(self, opened: Opened, number: int) -> None:
        self._opened, self._number = opened, number
        self.key, self.name, self.rounding, self.differing = opened.call("about", number)

    def run(self, inputs: npt.NDArray[np.float32]) -> IntegerRun:
        return cast(IntegerRun, self._opened.call("ask", self._number, "run", inputs))

    def run_untouched(self, inputs: npt.NDArray[np.float32]) -> Levels:
        return cast(Levels, self._opened.call("ask", self._number, "run_untouched", inputs))

    def latency(self, sample: npt.NDArray[np.float32]) -> float:
        """Median seconds of one sample, without the way to the other process and back."""
        return cast(float, self._opened.call("ask", self._number, "latency", sample))
