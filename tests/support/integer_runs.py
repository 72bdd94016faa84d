"""Running integer files in every runtime, on levels, and what verify says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from onnx import helper

from tqexport.backends import backend_of
from tqexport.backends.onnx.integer_form import LEVELS
from tqexport.backends.tflite.layout import to_channels_first, to_channels_last
from tqexport.integer.arithmetic import Rounding
from tqexport.integer.grids import OFFSET
from tqexport.integer.model import IntegerModel
from tqexport.integer.names import INTEGER
from tqexport.integer.naming import INPUT
from tqexport.model import TruncModel
from tqexport.verification.comparison import Verdict
from tqexport.verification.fresh import FreshExports
from tqexport.verification.jobs import Job
from tqexport.verification.run import check
from tqexport.verification.samples import Samples
from tqexport.verification.trial import project_of

__all__ = [
    "TFLITE_ROUNDINGS",
    "differing_operations",
    "integer_verdicts",
    "levels_of_onnx",
    "onnx_session",
    "optimised_operators",
    "run_tflite_levels",
    "tflite_interpreter",
]


def onnx_session(content: bytes) -> Any:
    """A file in onnxruntime with its default optimisations, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def tflite_interpreter(content: bytes, *, xnnpack: bool = True) -> Any:
    """A file in LiteRT, with XNNPACK or its own kernels."""
    resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=content, num_threads=1, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    return interpreter


TFLITE_ROUNDINGS: tuple[Rounding, ...] = ("xnnpack", "litert", "tflm")


def run_tflite_levels(content: bytes, levels: Any, rounding: Rounding) -> Any:
    """The output levels (N, ...) of an int8 file, one sample after the other."""
    samples = np.ascontiguousarray(to_channels_last(levels.astype(np.int16) - OFFSET).astype(np.int8))
    outputs = []
    if rounding == "tflm":
        runtime = pytest.importorskip(
            "tflite_micro.python.tflite_micro.runtime", reason="tflite-micro is not installed"
        )
        micro = runtime.Interpreter.from_bytes(content, arena_size=4_000_000)
        for sample in samples:
            micro.set_input(sample[None], 0)
            micro.invoke()
            outputs.append(micro.get_output(0))
    else:
        interpreter = tflite_interpreter(content, xnnpack=rounding == "xnnpack")
        source, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
        for sample in samples:
            interpreter.set_tensor(source, sample[None])
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(result))
    found = np.concatenate(outputs).astype(np.int16) + OFFSET
    return to_channels_first(found).astype(np.uint8)


def levels_of_onnx(content: bytes, inputs: Any, names: list[str]) -> dict[str, Any]:
    """The levels of some values of an ONNX file, as onnxruntime computes them with its optimisations."""
    model = onnx.load_from_string(content)
    outputs = [helper.make_tensor_value_info(name + LEVELS, onnx.TensorProto.UINT8, None) for name in names]
    model.graph.output.extend(outputs)
    session = onnx_session(model.SerializeToString())
    return dict(zip(names, session.run([name + LEVELS for name in names], {INPUT: inputs}), strict=True))


def optimised_operators(content: bytes, folder: Any, *, int8: bool = False) -> list[str]:
    """The operators that onnxruntime runs; with ``int8``, told to fuse what is between int8 values too."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", str(int(int8)))
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def differing_operations(network: IntegerModel, values: dict[str, Any], rounding: Rounding) -> list[str]:
    """The operations whose output is another than the integer model's, given the same input."""
    return [
        operation.output
        for operation in network.operations
        if not np.array_equal(network.compute(operation, values, rounding), values[operation.output])
    ]


_exports: dict[int, FreshExports] = {}  # by the number of the network, which they keep


def integer_verdicts(
    model: TruncModel,
    bits: int,
    content: bytes,
    inputs: Any,
    kernel: str = INTEGER,
    *,
    switched: bool = False,
    fresh: FreshExports | None = None,
) -> dict[str, Verdict]:
    """What verify says of a file in every runtime that is here, by the runtime's name.

    Args:
        model: The calibrated network.
        bits: The width.
        content: The file.
        inputs: float32 (N, *input_shape).
        kernel: How it multiplies.
        switched: Whether it is a run-time file.
        fresh: What the file is compared with; of ``model`` by default.
    """
    backend = backend_of(content)
    batch = backend.batch(content)
    job = Job(bits, backend, kernel, "file", content, run_time=switched, batch=batch)
    fresh = fresh or _exports.setdefault(id(model), FreshExports(project_of(model), {}))
    checked = check(project_of(model), job, Samples((inputs,), None, "samples"), (), fresh)
    return {each.deployed.runtime: each.deployed for each in checked}
