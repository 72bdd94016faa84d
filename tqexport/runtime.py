"""Running an exported file in an application: open it, set the width, run.

Needs numpy, the one runtime that the file is for, and what truncating it takes (onnx, or flatbuffers); neither torch
nor TensorFlow nor the checkpoint.
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.artifacts.truncate import artifact_widths, is_tflite, truncate_file
from tqexport.errors import InputError

__all__ = ["SwitchableModel"]

Array = npt.NDArray[np.float32]


class SwitchableModel:
    """An artifact of tqexport whose width can be set between two runs.

    A run-time file (``NAME.onnx``, ``NAME.tflite``) has every width that it was exported with, a fixed one
    (``NAME-w4.onnx``) has its own, and with the tables of other widths (``--truncatable``) those, too.
    The file's content is kept once; a width becomes the fixed network of that width when it is first run, so a run
    takes as long as with a fixed file. Each width that was run holds a session or interpreter of its own until
    :meth:`release`. Not for several threads at once.

    Example::

        model = SwitchableModel("tqexport-out/ckpt.onnx")
        model.bits = 2
        logits = model.run(batch)
    """

    def __init__(self, source: str | Path | bytes, bits: int | None = None, *, threads: int = 1) -> None:
        """Open an artifact.

        Args:
            source: The file or its content.
            bits: The width to start with; default that of a fixed file, the widest of a run-time file.
            threads: Threads that one run uses.

        Raises:
            InputError: The file is missing, damaged or not of tqexport, or lacks the width.
        """
        path = Path(source) if isinstance(source, str) else source
        held = artifact_widths(path)
        self._widths, self._truncatable = held.widths, held.truncatable
        self._content = path if isinstance(path, bytes) else path.read_bytes()
        self._engine = _LiteRT if is_tflite(self._content) else _OnnxRuntime
        self._threads = threads
        self._engines: dict[int, _Engine] = {}
        self.bits = (held.own or self._widths[-1]) if bits is None else bits

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that :attr:`bits` may have, ascending."""
        return self._widths

    @property
    def bits(self) -> int:
        """The width of the next run."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        if bits not in self._widths:
            have = ", ".join(map(str, self._widths))
            raise InputError(f"the file holds {have} bits, so it cannot run at {bits}")
        self._bits = int(bits)

    def run(self, batch: Array) -> Array:
        """Run the network at the current width.

        Args:
            batch: float32 (N, ...), normalised, in the layout of the file: channels first for ONNX, channels last for
                TFLite.

        Returns:
            The outputs, float32 (N, ...).

        Raises:
            InputError: The runtime does not take the file or the batch.
        """
        if self._bits not in self._engines:
            content = truncate_file(self._content, self._bits) if self._truncatable else self._content
            self._engines[self._bits] = self._engine(content, self._threads)
            del content
            _return_freed_memory()
        return self._engines[self._bits].run(np.ascontiguousarray(batch, np.float32))

    def release(self) -> None:
        """Free what the widths run so far hold; each is built again when it is next run."""
        self._engines.clear()
        _return_freed_memory()


def _return_freed_memory() -> None:
    """Give back what building a session took for a moment: three times what it keeps, and glibc holds on to it."""
    trim = None if os.name == "nt" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Engine(ABC):
    """A fixed network, ready to run."""

    @abstractmethod
    def __init__(self, content: bytes, threads: int) -> None: ...

    @abstractmethod
    def run(self, batch: Array) -> Array: ...


class _OnnxRuntime(_Engine):
    def __init__(self, content: bytes, threads: int) -> None:
        from tqexport.backends.onnx.session import open_session

        self._session: Any = open_session(content, threads=threads)
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: Array) -> Array:
        try:
            outputs: Array = self._session.run(None, {self._input: batch})[0]
        except Exception as error:  # as above
            raise InputError(f"onnxruntime does not run the batch: {str(error).splitlines()[0]}") from error
        return outputs


class _LiteRT(_Engine):
    def __init__(self, content: bytes, threads: int) -> None:
        from tqexport.backends.tflite.session import open_interpreter

        self._interpreter: Any = open_interpreter(content, threads=threads)
        details = self._interpreter.get_input_details()[0]
        self._input, self._shape = details["index"], tuple(int(n) for n in details["shape"][1:])
        self._output = self._interpreter.get_output_details()[0]["index"]

    def run(self, batch: Array) -> Array:
        if not len(batch) or batch.shape[1:] != self._shape:
            raise InputError(f"the file takes samples of shape {self._shape}, channels last, not {batch.shape[1:]}")
        if len(batch) == 1:
            return self._run_one(batch)
        return np.concatenate([self._run_one(sample[None]) for sample in batch])

    def _run_one(self, sample: Array) -> Array:
        self._interpreter.set_tensor(self._input, sample)
        self._interpreter.invoke()
        output: Array = self._interpreter.get_tensor(self._output)
        return output
