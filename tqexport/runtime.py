"""Running an exported file in an application: open it, set the width, run.

Needs numpy and the one runtime that the file is for, and for ONNX files the package onnx, which cuts a width out: the
extras ``onnxruntime`` and ``litert``. Neither torch nor TensorFlow nor the checkpoint.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.artifacts.truncate import open_artifact
from tqexport.backends.running import Session
from tqexport.errors import InputError
from tqexport.extras import needs

__all__ = ["SwitchableModel"]

Array = npt.NDArray[Any]


class SwitchableModel:
    """An artifact of tqexport whose width can be set between two runs.

    A run-time file (``NAME.onnx``, ``NAME.tflite``) has every width that it was exported with, a fixed one
    (``NAME-w4.onnx``) has its own, and with the tables of other widths (``--truncatable``) those, too.
    The file's content is kept once; a width becomes the fixed network of that width when it is first run, so a run
    takes as long as with a fixed file. Each width that was run holds a session of its own until :meth:`release`. Not
    for several threads at once.

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
            HostError: A package is missing.
        """
        with needs():
            self._artifact = open_artifact(Path(source) if isinstance(source, str) else source)
        self._threads = threads
        self._sessions: dict[int, Session] = {}
        self.bits = (self._artifact.own or self.widths[-1]) if bits is None else bits

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that :attr:`bits` may have, ascending."""
        return self._artifact.widths

    @property
    def bits(self) -> int:
        """The width of the next run."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        if bits not in self.widths:
            have = ", ".join(map(str, self.widths))
            raise InputError(f"the file holds {have} bits, so it cannot run at {bits}")
        self._bits = int(bits)

    def run(self, *inputs: Array) -> Array:
        """Run a network that has one output, at the current width.

        Args:
            inputs: An array (N, ...) for each input, in the order of the file; floats normalised, in the layout of the
                file: channels first for ONNX, channels last for TFLite.

        Returns:
            The output, (N, ...).

        Raises:
            InputError: The runtime does not take the file or the batch, or the network has several outputs.
            HostError: The runtime is not installed.
        """
        outputs = self.outputs(*inputs)
        if len(outputs) > 1:
            raise InputError(
                f"{self._artifact.name} has the outputs {', '.join(outputs)}; call outputs() for all of them"
            )
        return next(iter(outputs.values()))

    def outputs(self, *inputs: Array) -> dict[str, Array]:
        """Every output by name, in the order of the file; otherwise as :meth:`run`."""
        if self._bits not in self._sessions:
            with needs():
                self._sessions[self._bits] = self._open()
            _return_freed_memory()
        session = self._sessions[self._bits]
        batch = tuple(
            np.ascontiguousarray(values, np.float32 if np.issubdtype(np.asarray(values).dtype, np.floating) else None)
            for values in inputs
        )
        return dict(zip(session.output_names, session.run(batch), strict=True))

    def release(self) -> None:
        """Free what the widths run so far hold; each is built again when it is next run."""
        self._sessions.clear()
        _return_freed_memory()

    def _open(self) -> Session:
        """The fixed network of the current width, ready to run."""
        artifact = self._artifact
        content = artifact.truncate(self._bits) if artifact.holds_several else artifact.content
        session = artifact.backend.open_session(content, threads=self._threads)
        if session is None:
            raise InputError(f"{artifact.name} is a {artifact.backend.title} file, which nothing here can run")
        return session


def _return_freed_memory() -> None:
    """Give back what building a session took for a moment: three times what it keeps, and glibc holds on to it."""
    trim = None if os.name == "nt" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
