"""Running ONNX files in onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from tqexport.backends.onnx.file import BITS_NAME
from tqexport.backends.running import Session
from tqexport.errors import InputError

if TYPE_CHECKING:
    from tqexport.backends.running import Array

__all__ = ["OnnxSession"]

_LONGEST = 300  # characters of what onnxruntime says


class OnnxSession(Session):
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, content: bytes, *, bits: int | None = None, optimized: bool = True, threads: int = 1) -> None:
        """Open a file.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.
            optimized: With the graph optimisations that onnxruntime makes by default, and those for files with int8
                values, which it makes on x86 when told to; otherwise with none.
            threads: Threads to run on.

        Raises:
            InputError: onnxruntime does not take the file.
        """
        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        # Otherwise x86 computes what is between int8 values in floats. Files with uint8 values are run the same.
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session: Any = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise InputError(f"onnxruntime does not load the file: {_in_a_line(error)}") from error
        taken = [value for value in self._session.get_inputs() if bits is None or value.name != BITS_NAME]
        self.input_names = [value.name for value in taken]
        self.output_names = [value.name for value in self._session.get_outputs()]
        size = next((value.shape[0] for value in taken if value.shape), None)
        self.batch = size if isinstance(size, int) else None  # and not the name of a size, or none
        self._switch = {} if bits is None else {BITS_NAME: np.array(bits, np.uint8)}

    def run_group(self, *group: Array) -> list[Array]:
        try:
            fed = dict(zip(self.input_names, group, strict=True))
            results: list[Array] = self._session.run(None, {**fed, **self._switch})
        except Exception as error:  # of no common base, as when loading
            raise InputError(f"onnxruntime does not run the batch: {_in_a_line(error)}") from error
        return results


def _in_a_line(error: Exception) -> str:
    """What onnxruntime says, which may go on over several lines, and for long."""
    return " ".join(str(error).split())[:_LONGEST]
