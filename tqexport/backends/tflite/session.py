"""Opening TFLite files in LiteRT."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ai_edge_litert.interpreter import Interpreter, OpResolverType

from tqexport.errors import InputError

__all__ = ["open_interpreter"]


def open_interpreter(content: bytes, *, xnnpack: bool = True, threads: int = 1) -> Interpreter:
    """An interpreter with its tensors allocated.

    Args:
        content: The file.
        xnnpack: Use the XNNPACK kernels, as devices do; otherwise LiteRT's own.
        threads: Threads to run on.

    Raises:
        InputError: LiteRT does not take the file.
    """
    resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        with _without_stderr():
            interpreter = Interpreter(
                model_content=content, num_threads=threads, experimental_op_resolver_type=resolver
            )
            interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"LiteRT does not load the file: {error}") from error
    return interpreter


@contextmanager
def _without_stderr() -> Iterator[None]:
    """LiteRT announces its delegate on the process's standard error and has no setting against it."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
