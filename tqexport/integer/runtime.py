"""An integer file open in a runtime: the seam between the back ends and the verification of integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tqexport.integer.arithmetic import Rounding

__all__ = ["IntegerRun", "IntegerRuntime"]

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
        differing: Names of the constants and operators of the file that are not those of the integer model.
    """

    key: str
    name: str
    rounding: Rounding
    differing: tuple[str, ...]

    @abstractmethod
    def run(self, inputs: npt.NDArray[np.float32]) -> IntegerRun:
        """Run samples, float32 (N, *input_shape) channels first.

        Raises:
            InputError: The runtime does not run the file on them.
        """

    @abstractmethod
    def run_untouched(self, inputs: npt.NDArray[np.float32]) -> Levels:
        """Levels of the outputs of the file as it is, (N, ...)."""
