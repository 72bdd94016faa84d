"""Opening ONNX files in onnxruntime."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from tqexport.errors import InputError

__all__ = ["open_session"]


def open_session(content: bytes, *, optimized: bool = True, threads: int = 1) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        content: The file.
        optimized: With the graph optimisations that onnxruntime makes by default; otherwise with none.
        threads: Threads to run on.

    Raises:
        InputError: onnxruntime does not take the file.
    """
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is raised, and said once
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise InputError(f"onnxruntime does not load the file: {str(error).splitlines()[0]}") from error
