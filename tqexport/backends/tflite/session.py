"""Running TFLite files in LiteRT, as many samples at a time as the file takes: one, or the batch of its export."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from tqexport.backends.running import Session
from tqexport.backends.tflite.file import ends_of_signature, signature_of
from tqexport.backends.tflite.packing import DECODE
from tqexport.errors import InputError, first_line

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch

__all__ = ["LiteRTSession"]


class LiteRTSession(Session):
    """A TFLite file in LiteRT."""

    def __init__(self, content: bytes, *, bits: int | None = None, xnnpack: bool = True, threads: int = 1) -> None:
        """Open a file.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.
            xnnpack: Use the XNNPACK kernels, as devices do; otherwise LiteRT's own.
            threads: Threads to run on.

        Raises:
            InputError: LiteRT does not take the file, or the file lacks the width.
        """
        resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            with _without_stderr():
                self._interpreter: Any = Interpreter(
                    model_content=content, num_threads=threads, experimental_op_resolver_type=resolver
                )
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            if DECODE in str(error):
                raise InputError(
                    "the weights are packed for TFLite Micro, and LiteRT does not unpack them; export the width with "
                    "--kernel integer to run it in LiteRT"
                ) from error
            raise InputError(f"LiteRT does not load the file: {first_line(error)}") from error
        self._invoke: Callable[[Sequence[Array]], list[Array]] = self._invoke_graph
        self._inputs = self._interpreter.get_input_details()
        if bits is not None:
            self._invoke = self._invoke_signature
            self._open_signature(content, bits)
        self._shapes = [tuple(int(n) for n in detail["shape"]) for detail in self._inputs]
        self._outputs = [detail["index"] for detail in self._interpreter.get_output_details()]
        self.input_names = [str(detail["name"]) for detail in self._inputs]
        self.output_names = [str(detail["name"]) for detail in self._interpreter.get_output_details()]
        self.batch: int = max(1, next((shape[0] for shape in self._shapes if shape), 1))  # the first input says it

    def check(self, batch: Batch) -> None:
        super().check(batch)
        for values, shape in zip(batch, self._shapes, strict=True):
            if values.shape[1:] != shape[1:]:
                raise InputError(f"the file takes samples of shape {shape[1:]}, channels last, not {values.shape[1:]}")

    def run_group(self, *group: Array) -> list[Array]:
        try:
            values = [value.reshape(shape) for value, shape in zip(group, self._shapes, strict=True)]
            return self._invoke(values)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"LiteRT does not run the file: {first_line(error)}") from error

    def run_zeros(self) -> list[Array]:
        """Run samples of zeros."""
        return self.run_group(*(np.zeros(detail["shape"], detail["dtype"]) for detail in self._inputs))

    def _open_signature(self, content: bytes, bits: int) -> None:
        """Choose the signature of a width."""
        try:
            self._signature = self._interpreter.get_signature_runner(signature_of(bits))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"LiteRT does not run the file at {bits} bits: {first_line(error)}") from error
        self._signature_ends = ends_of_signature(content, bits)
        given = self._signature.get_input_details()
        self._inputs = [given[name] for name in self._signature_ends[0]]

    def _invoke_graph(self, values: Sequence[Array]) -> list[Array]:
        for detail, value in zip(self._inputs, values, strict=True):
            self._interpreter.set_tensor(detail["index"], value)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]

    def _invoke_signature(self, values: Sequence[Array]) -> list[Array]:
        inputs, outputs = self._signature_ends
        results = self._signature(**dict(zip(inputs, values, strict=True)))
        return [results[name] for name in outputs]


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
