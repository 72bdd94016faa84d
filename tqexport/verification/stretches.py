"""Running an artifact from one activation quantiser to the next, each stretch on activations that are given.

The graph is cut at every rounding: what it would have rounded becomes an output, and the rounded value an input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt

from tqexport.backends.onnx.file import OUTPUT_NAME
from tqexport.backends.onnx.session import open_session
from tqexport.backends.tflite.file import CHANNELS_FIRST
from tqexport.backends.tflite.session import open_interpreter
from tqexport.errors import InputError
from tqexport.verification.runtimes import Array, single_graph, to_channels_first, to_channels_last

__all__ = ["Stretches", "open_stretches"]

Inputs = npt.NDArray[np.float32]
Stretches = Callable[[Inputs, Mapping[str, Array]], tuple[Array, dict[str, Array]]]
"""From inputs and the levels of each activation (N, ...) to outputs, and by activation what is rounded there."""


def open_stretches(content: bytes, bits: int | None, activations: Collection[str]) -> Stretches:
    """Open an artifact in its runtime, as deployed but for the cuts.

    Args:
        content: An ONNX or TFLite file.
        bits: The width to run a run-time file at; None for a fixed file.
        activations: Which roundings to cut at, by name (``<module>/Round``). Everything is channels first.

    Raises:
        InputError: The runtime does not take the file.
    """
    return (_litert if content[4:8] == b"TFL3" else _onnxruntime)(content, bits, activations)


def _onnxruntime(content: bytes, bits: int | None, activations: Collection[str]) -> Stretches:
    import onnx

    model = onnx.load_from_string(content)
    cut = [node for node in model.graph.node if node.op_type == "Round" and node.output[0] in activations]
    for node in cut:
        model.graph.node.remove(node)
        model.graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
        model.graph.output.append(onnx.ValueInfoProto(name=node.input[0]))
    names = [node.output[0] for node in cut]
    session = open_session(model.SerializeToString())
    source = session.get_inputs()[0].name
    switch = {} if bits is None else {"bits": np.array(bits, np.uint8)}

    def run(inputs: Inputs, levels: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        # Of one shape they may still be laid out otherwise: TFLite keeps an axis of 1 through 1-D convolutions.
        given = {name: levels[name] for name in names}
        try:
            outputs, *rounded = session.run(None, {source: inputs, **switch, **given})
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise InputError(f"onnxruntime does not run the file: {str(error).splitlines()[0]}") from error
        return outputs, dict(zip(names, rounded, strict=True))

    return run


def _litert(content: bytes, bits: int | None, activations: Collection[str]) -> Stretches:
    flat, facts = single_graph(content, bits)
    kept = facts.get(CHANNELS_FIRST, ())
    cut = {
        flat.name(int(operator.outputs[0])): operator
        for operator in flat.graph.operators
        if flat.operator_name(operator) == "ROUND" and flat.name(int(operator.outputs[0])) in activations
    }
    removed = [id(operator) for operator in cut.values()]
    flat.graph.operators = [operator for operator in flat.graph.operators if id(operator) not in removed]
    flat.graph.inputs = np.array([*flat.graph.inputs, *(each.outputs[0] for each in cut.values())], np.int32)
    flat.graph.outputs = np.array([*flat.graph.outputs, *(each.inputs[0] for each in cut.values())], np.int32)
    flat.model.signatureDefs = None
    interpreter = open_interpreter(flat.pack())
    sources = interpreter.get_input_details()
    targets = [detail["index"] for detail in interpreter.get_output_details()]

    def run(inputs: Inputs, levels: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        collected: list[list[Array]] = []
        given = [to_channels_last(levels[name], kept=name in kept) for name in cut]
        try:
            for sample in zip(to_channels_last(inputs), *given, strict=True):
                for detail, value in zip(sources, sample, strict=True):
                    interpreter.set_tensor(detail["index"], value.reshape(detail["shape"]))
                interpreter.invoke()
                collected.append([interpreter.get_tensor(index) for index in targets])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"LiteRT does not run the file: {error}") from error
        values = [np.concatenate(parts) for parts in zip(*collected, strict=True)]
        outputs, *rounded = (
            to_channels_first(value, kept=name in kept) for name, value in zip((OUTPUT_NAME, *cut), values, strict=True)
        )
        return outputs, dict(zip(cut, rounded, strict=True))

    return run
