"""Running int8 TFLite files in TFLite Micro's interpreter, which is a package of the extra ``devices``."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import ConversionError, HostError, InputError, about

__all__ = ["MicroSession", "check_micro", "run_once_in_micro"]

_PACKAGE = "tflite_micro"
_ARENA = 64 << 20  # bytes; more than any device has


def check_micro() -> None:
    """Make sure that TFLite Micro is here.

    Raises:
        HostError: It is not installed.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        raise HostError("TFLite Micro is not installed: pip install 'tqexport[devices]'")


class MicroSession:
    """A TFLite file in TFLite Micro."""

    def __init__(self, content: bytes) -> None:
        """Open a file.

        Raises:
            HostError: TFLite Micro is not installed.
            InputError: It does not take the file.
        """
        check_micro()
        from tflite_micro.python.tflite_micro import runtime

        try:
            self._interpreter: Any = runtime.Interpreter.from_bytes(content, arena_size=_ARENA)
        except RuntimeError as error:
            raise InputError(f"TFLite Micro does not take the file: {error}") from error

    def run_group(self, samples: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The output for as many samples as the file takes, both of the types that the file has.

        Raises:
            InputError: TFLite Micro does not run the file on it.
        """
        try:
            self._interpreter.set_input(samples, 0)
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"TFLite Micro does not run the file: {error}") from error
        output: npt.NDArray[np.generic] = self._interpreter.get_output(0)
        return output

    def run_zeros(self) -> npt.NDArray[np.generic]:
        """The output for samples of zeros."""
        details = self._interpreter.get_input_details(0)
        return self.run_group(np.zeros(details["shape"], details["dtype"]))


def run_once_in_micro(content: bytes) -> None:
    """Load a file in TFLite Micro and run it on zeros.

    Raises:
        HostError: TFLite Micro is not installed.
        ConversionError: It does not load or does not run.
    """
    with about("the file that was written is not right:", ConversionError):
        MicroSession(content).run_zeros()
