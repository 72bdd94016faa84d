"""Running C files for verification: compiled by this machine's C compiler, called in this process.

A file is code, so none is compiled that is not, letter by letter, what tqexport writes for the checkpoint: anything
else is named as differing and not run.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.c.companions import header
from tqexport.backends.c.source import Program
from tqexport.backends.c.text import prefix_of
from tqexport.backends.tflite.layout import to_channels_first, to_channels_last
from tqexport.errors import HostError, InputError
from tqexport.files import temporary_folder
from tqexport.integer.arithmetic import to_grid
from tqexport.integer.grids import OFFSET
from tqexport.integer.model import IntegerModel
from tqexport.integer.naming import INPUT
from tqexport.integer.runtime import IntegerRun, IntegerRuntime, Levels

__all__ = ["COMPILER", "CRuntime", "compiler"]

COMPILER = "cc"
_FLAGS = ("-std=c99", "-O3", "-shared", "-fPIC")
_SECONDS = 300


def compiler() -> str:
    """The path of this machine's C compiler.

    Raises:
        HostError: There is none.
    """
    path = shutil.which(COMPILER)
    if path is None:
        raise HostError("no C compiler is installed (cc); install gcc or clang, or choose others with --runtime")
    return path


class CRuntime(IntegerRuntime):
    """A C file as this machine's compiler makes it."""

    key, name, rounding = "c", "C", "tflm"

    def __init__(
        self, content: bytes, fresh: Program, networks: Sequence[IntegerModel], network: IntegerModel, stem: str
    ) -> None:
        """Compile a file.

        Args:
            content: The file.
            fresh: What the checkpoint gives.
            networks: The integer models of all widths in it.
            network: The one to run.
            stem: The name of the file without ``.c``.

        Raises:
            HostError: There is no compiler, or it fails.
        """
        self._network = network
        self.differing = differing(content.decode("utf-8", "replace"), fresh.source)
        self._function: Any = None
        if not self.differing:
            library = _compiled(fresh.source, header(networks, stem, fresh.arena_bytes), stem)
            self._function = library[f"{prefix_of(stem)}_run"]

    def run(self, inputs: npt.NDArray[np.float32]) -> IntegerRun:
        return IntegerRun({}, self.run_untouched(inputs))

    def run_untouched(self, inputs: npt.NDArray[np.float32]) -> Levels:
        network = self._network
        shape = network.shapes[network.output]
        outputs = np.zeros((len(inputs), *shape[1:], shape[0]), np.int8)
        if self._function is None:  # what is no export of tqexport is not run
            return to_channels_first(outputs).astype(np.uint8)
        levels = to_grid(inputs, network.grids[INPUT]).astype(np.int16) - OFFSET
        samples = np.ascontiguousarray(to_channels_last(levels.astype(np.int8)))
        for sample, output in zip(samples, outputs, strict=True):
            if self._function(_pointer(sample), _pointer(output), network.bits):
                raise InputError(f"does not run at {network.bits} bits")
        return to_channels_first(outputs.astype(np.int16) + OFFSET).astype(np.uint8)


def _pointer(values: npt.NDArray[np.int8]) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))


@functools.lru_cache(maxsize=1)  # a run-time file is opened at one width after the other
def _compiled(source: str, header_text: str, stem: str) -> Any:
    """The library of a C file."""
    with temporary_folder() as place:
        command = [compiler(), *_FLAGS, "-o", "network.so", "network.c"]
        try:
            (place / f"{stem}.h").write_bytes(header_text.encode())
            (place / "network.c").write_bytes(source.encode())
            subprocess.run(command, cwd=place, check=True, capture_output=True, text=True, timeout=_SECONDS)
            return ctypes.CDLL(str(place / "network.so"))  # stays loaded when the file is gone
        except (subprocess.SubprocessError, OSError) as error:
            said = str(getattr(error, "stderr", None) or "").strip() or str(error)
            raise HostError(f"the C compiler of this machine fails: {said.splitlines()[0]}") from error


def differing(text: str, expected: str) -> tuple[str, ...]:
    """Names of the parts of a file that are not as expected: tables by the layer that they belong to."""
    names: dict[str, None] = {}
    layer = "the program"
    for own, other in itertools.zip_longest(text.split("\n"), expected.split("\n")):
        if other is not None and (comment := re.fullmatch(r"/\* (\S+) \*/", other)):
            layer = comment[1]
        elif other and not other.startswith(("    ", "}", "static const")):
            layer = "the program"
        if own != other:
            names[layer] = None
    return tuple(names)
