"""Running a run-time file at one of its widths, as deployed and with a look inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError
from tqexport.litert import open_interpreter
from tqexport.runtimes import RuntimeRun, _channels_first, _channels_last
from tqexport.switching import WIDTHS

__all__ = ["run_switchable_onnx", "run_switchable_tflite"]

Array = npt.NDArray[Any]
_BATCH = 64


def run_switchable_onnx(content: bytes, bits: int, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
    """Run a run-time ONNX file in onnxruntime, one thread, with ``bits`` fed to it.

    Args:
        content: The file.
        bits: The width to feed, 0 to 255.
        inputs: float32 (N, ...) channels first.

    Raises:
        InputError: onnxruntime does not take the file, or the file lacks the width.
    """
    import onnx

    from tqexport.onnx_file import activation_outputs

    model = onnx.load_from_string(content)
    shifts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "BitShift"}
    activations = activation_outputs(model)
    outputs = _onnx_outputs(content, bits, inputs)[0]
    for names, dtype in ((shifts, onnx.TensorProto.UINT8), (activations, onnx.TensorProto.FLOAT)):
        model.graph.output.extend(onnx.helper.make_tensor_value_info(name, dtype, None) for name in names)
    traced, *inside = _onnx_outputs(model.SerializeToString(), bits, inputs, batchless=len(shifts))
    codes: dict[str, list[Array]] = {}
    for initializer, value in zip(shifts.values(), inside, strict=False):
        codes.setdefault(initializer.removesuffix(".codes"), []).append(value)
    return RuntimeRun("onnxruntime", codes, dict(zip(activations, inside[len(shifts) :], strict=True)), traced, outputs)


def run_switchable_tflite(content: bytes, bits: int, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
    """Run one signature of a run-time TFLite file in LiteRT with XNNPACK, one thread.

    The codes of the result are what RIGHT_SHIFT computed, in PyTorch's axis order; 1-D convolutions have a further
    axis of 1.

    Args:
        content: The file.
        bits: The width.
        inputs: float32 (N, ...) channels first; turned to channels last for the file.

    Raises:
        InputError: LiteRT does not take the file, or the file lacks the width.
    """
    from tqexport.tflite_codes import TO_TORCH
    from tqexport.tflite_file import subgraph_of, unpack

    model, facts = unpack(content)
    if bits not in facts.get(WIDTHS, ()):
        raise InputError(f"the file has no signature for {bits} bits")
    flat = subgraph_of(model, bits)
    shifted: dict[int, tuple[str, tuple[int, ...]]] = {}
    rounded: dict[int, str] = {}
    for position, operator in enumerate(flat.graph.operators):
        output = int(operator.outputs[0])
        if flat.operator_name(operator) == "ROUND":
            rounded[output] = flat.name(output)
        elif flat.operator_name(operator) == "RIGHT_SHIFT":
            weight = flat.graph.operators[position + 3].outputs[0]
            kinds = map(flat.operator_name, flat.consumers(weight))
            shifted[output] = flat.name(weight), next(TO_TORCH[kind] for kind in kinds if kind in TO_TORCH)
    flat.graph.outputs = np.array([*flat.graph.outputs, *rounded, *shifted], np.int32)
    flat.model.signatureDefs = None
    traced, *inside = _traced(flat.pack(), inputs, batchless=len(shifted))
    activations = dict(zip(rounded.values(), inside, strict=False))
    codes: dict[str, list[Array]] = {}
    for (name, order), value in zip(shifted.values(), inside[len(rounded) :], strict=True):
        codes.setdefault(name, []).append(value.transpose(order))
    return RuntimeRun("LiteRT", codes, activations, traced, _signature_outputs(content, bits, inputs))


def _signature_outputs(content: bytes, bits: int, inputs: npt.NDArray[np.float32]) -> Array:
    from tqexport.tflite_file import signature_of

    try:
        runner = open_interpreter(content).get_signature_runner(signature_of(bits))
        (name,) = runner.get_input_details()
        outputs = [next(iter(runner(**{name: sample[None]}).values())) for sample in _channels_last(inputs)]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"LiteRT does not run the file at {bits} bits: {error}") from error
    return _channels_first(np.concatenate(outputs))


def _traced(content: bytes, inputs: npt.NDArray[np.float32], batchless: int) -> list[Array]:
    """Every output over all samples, one at a time; the last ``batchless`` do not depend on the sample."""
    interpreter = open_interpreter(content)
    source = interpreter.get_input_details()[0]["index"]
    outputs = [detail["index"] for detail in interpreter.get_output_details()]
    split = len(outputs) - batchless
    collected = []
    for sample in _channels_last(inputs):
        interpreter.set_tensor(source, sample[None])
        interpreter.invoke()
        collected.append([interpreter.get_tensor(index) for index in outputs[:split]])
    batches = [_channels_first(np.concatenate(parts)) for parts in zip(*collected, strict=True)]
    return batches + [interpreter.get_tensor(index) for index in outputs[split:]]


def _onnx_outputs(content: bytes, bits: int, inputs: npt.NDArray[np.float32], batchless: int = 0) -> list[Array]:
    """Every output over all samples; those at positions 1 to ``batchless`` do not depend on the sample."""
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        name, switch = (value.name for value in session.get_inputs())
        width = np.array(bits, np.uint8)
        batches = [
            session.run(None, {name: inputs[i : i + _BATCH], switch: width}) for i in range(0, len(inputs), _BATCH)
        ]
    except Exception as error:  # onnxruntime's exceptions have no common base below Exception
        raise InputError(f"onnxruntime does not run the file: {str(error).splitlines()[0]}") from error
    return [
        parts[0] if 1 <= position <= batchless else np.concatenate(parts)
        for position, parts in enumerate(zip(*batches, strict=True))
    ]
