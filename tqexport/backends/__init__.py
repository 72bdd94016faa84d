"""The formats that networks are exported to, a folder for each.

Importing this loads no framework: a back end brings in what it needs when it is asked to do something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqexport.backends.base import Backend
from tqexport.backends.c import CBackend
from tqexport.backends.onnx import OnnxBackend
from tqexport.backends.running import Runner, RuntimeRun
from tqexport.backends.tflite import TfliteBackend
from tqexport.errors import InputError

if TYPE_CHECKING:
    from tqexport.backends.running import Array

__all__ = ["BACKENDS", "RUNTIMES", "backend_of", "open_runner", "run_file"]

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (OnnxBackend(), TfliteBackend(), CBackend())}

RUNTIMES = tuple(name for backend in BACKENDS.values() for name in (*backend.runtimes, *backend.integer_runtimes))
"""What runs the files of all formats, as ``--runtime`` takes it."""


def backend_of(content: bytes) -> Backend:
    """The back end whose format a file's content has.

    Raises:
        InputError: It is of none of them.
    """
    for backend in BACKENDS.values():
        if backend.recognises(content):
            return backend
    *formats, last = (backend.title for backend in BACKENDS.values())
    raise InputError(f"is not a valid {', '.join(formats)} or {last} file; export it again")


def open_runner(content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner:
    """An artifact of any format in its runtime; see :meth:`tqexport.backends.base.Backend.open_runner`.

    Raises:
        InputError: It is of no format that anything here runs, or its runtime does not take it.
    """
    backend = backend_of(content)
    runner = backend.open_runner(content, bits, deployed=deployed)
    if runner is None:
        raise InputError(f"is a {backend.title} file, which nothing here can run")
    return runner


def run_file(content: bytes, inputs: Array, bits: int | None = None) -> RuntimeRun:
    """Run samples (N, ...) channels first through an artifact of one input as deployed; see :func:`open_runner`."""
    return open_runner(content, bits).run((inputs,))
