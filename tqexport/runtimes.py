"""Running exported files in onnxruntime and LiteRT, as deployed and with a look inside."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import ConversionError, InputError
from tqexport.flatbuffer import FlatModel
from tqexport.litert import open_interpreter
from tqexport.tflite_codes import stored_integers
from tqexport.tflite_file import CHANNELS_FIRST, METADATA_NAME

__all__ = ["RuntimeRun", "run_onnx", "run_tflite"]

Array = npt.NDArray[Any]
_BATCH = 64


@dataclass(frozen=True)
class RuntimeRun:
    """What a runtime computed for N samples.

    Attributes:
        runtime: Its name, for people.
        codes: By weight name, each place where the file holds it: the shifted uint8 codes (onnxruntime), or the stored
            int8 integers, output channels first (LiteRT).
        activations: By ``<module>/Round``: whole-number levels 0 to ``M_a``, float32 (N, ...) channels first.
        traced_outputs: float32 (N, ...), of the run that also gave the activations.
        outputs: float32 (N, ...), of the untouched file with the runtime's default optimisations.
    """

    runtime: str
    codes: Mapping[str, list[Array]]
    activations: Mapping[str, Array]
    traced_outputs: Array
    outputs: Array


def run_onnx(content: bytes, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
    """Run an ONNX file of tqexport in onnxruntime, one thread.

    Args:
        content: The file.
        inputs: float32 (N, ...) channels first.

    Raises:
        InputError: onnxruntime does not take the file.
    """
    import onnx

    from tqexport.onnx_file import activation_outputs

    model = onnx.load_from_string(content)
    shifts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "BitShift"}
    activations = activation_outputs(model)
    outputs = _onnx_outputs(content, inputs)[0]
    for name in shifts:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    for name in activations:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    traced, *inside = _onnx_outputs(model.SerializeToString(), inputs, batchless=len(shifts))
    codes: dict[str, list[Array]] = {}
    for initializer, value in zip(shifts.values(), inside, strict=False):
        codes.setdefault(initializer.removesuffix(".codes"), []).append(value)
    return RuntimeRun("onnxruntime", codes, dict(zip(activations, inside[len(shifts) :], strict=True)), traced, outputs)


def run_tflite(content: bytes, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
    """Run a TFLite file of tqexport in LiteRT with XNNPACK, one thread.

    Args:
        content: The file.
        inputs: float32 (N, ...) channels first; turned to channels last for the file.

    Raises:
        InputError: LiteRT does not take the file.
    """
    try:
        flat = FlatModel(content)
    except ConversionError as error:
        raise InputError(str(error)) from error
    codes = stored_integers(flat)
    kept = channels_first(flat)
    outputs = _tflite_outputs(content, inputs, kept)[0]
    rounded = {
        int(operator.outputs[0]): flat.name(operator.outputs[0])
        for operator in flat.graph.operators
        if flat.operator_name(operator) == "ROUND"
    }
    flat.graph.outputs = np.array([*flat.graph.outputs, *rounded], np.int32)
    flat.model.signatureDefs = None
    traced, *inside = _tflite_outputs(flat.pack(), inputs, kept)
    return RuntimeRun("LiteRT", codes, dict(zip(rounded.values(), inside, strict=True)), traced, outputs)


def _onnx_outputs(content: bytes, inputs: npt.NDArray[np.float32], batchless: int = 0) -> list[Array]:
    """Every output of a model over all samples; those at positions 1 to ``batchless`` do not depend on the sample."""
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        batches = [session.run(None, {name: inputs[i : i + _BATCH]}) for i in range(0, len(inputs), _BATCH)]
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise InputError(f"onnxruntime does not run the file: {str(error).splitlines()[0]}") from error
    return [
        parts[0] if 1 <= position <= batchless else np.concatenate(parts)
        for position, parts in enumerate(zip(*batches, strict=True))
    ]


def channels_first(flat: FlatModel) -> Collection[str]:
    """Names of the values of a file that are channels first, where all others are channels last."""
    described = flat.metadata(METADATA_NAME)
    kept: Collection[str] = json.loads(described).get(CHANNELS_FIRST, ()) if described else ()
    return kept


def _tflite_outputs(content: bytes, inputs: npt.NDArray[np.float32], kept: Collection[str]) -> list[Array]:
    """Every output of a file over all samples, one at a time, channels first, as those ``kept`` are in the file."""
    interpreter = open_interpreter(content)
    try:
        detail = interpreter.get_input_details()[0]
        samples = _channels_last(inputs)
        wanted = tuple(int(n) for n in detail["shape"][1:])
        if wanted != samples.shape[1:]:
            raise InputError(f"the file takes samples of shape {wanted}, not {samples.shape[1:]}")
        collected: list[list[Array]] = []
        for sample in samples:
            interpreter.set_tensor(detail["index"], sample[None])
            interpreter.invoke()
            collected.append([interpreter.get_tensor(out["index"]) for out in interpreter.get_output_details()])
        names = [detail["name"] for detail in interpreter.get_output_details()]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"LiteRT does not run the file: {error}") from error
    values = [np.concatenate(parts) for parts in zip(*collected, strict=True)]
    return [value if name in kept else _channels_first(value) for name, value in zip(names, values, strict=True)]


def _channels_last(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim > 2 else x


def _channels_first(x: Array) -> Array:
    return np.moveaxis(x, -1, 1) if x.ndim > 2 else x
