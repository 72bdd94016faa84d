"""Running ONNX files for verification: with their inner values, and from one activation quantiser to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx

from tqexport.backends.onnx.file import activation_outputs, is_right_shift
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.running import Runner
from tqexport.layer_kinds import ONNX_OPERATORS

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Inputs

__all__ = ["OnnxRunner", "OnnxStretches"]

_BATCH = 64
# Operators whose results are kept: those of the layers, and what else adds, normalises or clips.
_KEPT_OPERATORS = ONNX_OPERATORS | {"Add", "BatchNormalization", "Relu"}


class OnnxRunner(Runner):
    """An ONNX file in onnxruntime, and a copy of it whose codes, activations and layer outputs are outputs."""

    runtime = "onnxruntime"

    def __init__(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_runner`."""
        model = onnx.load_from_string(content)
        shifts = [node for node in model.graph.node if is_right_shift(node)]
        self._weights = [node.input[0].removesuffix(".codes") for node in shifts]
        activations, values = activation_outputs(model), [] if deployed else _layer_outputs(model)
        super().__init__(activations, values, deployed=deployed)
        self._untouched = OnnxSession(content, bits=bits, optimized=deployed)
        kept = (*(node.output[0] for node in shifts), *activations, *values)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kept)
        self._traced = OnnxSession(model.SerializeToString(), bits=bits, optimized=deployed)

    def run_traced(self, inputs: Inputs) -> tuple[dict[str, list[Array]], list[Array]]:
        traced = [self._traced.run(inputs[i : i + _BATCH]) for i in range(0, len(inputs), _BATCH)]
        codes: dict[str, list[Array]] = {}
        for weight, value in zip(self._weights, traced[0][1:], strict=False):
            codes.setdefault(weight, []).append(value)
        of_samples = zip(*(parts[:1] + parts[1 + len(self._weights) :] for parts in traced), strict=True)
        return codes, [np.concatenate(parts) for parts in of_samples]

    def run_untouched(self, inputs: Inputs) -> Array:
        return np.concatenate([self._untouched.run(inputs[i : i + _BATCH])[0] for i in range(0, len(inputs), _BATCH)])


class OnnxStretches:
    """An ONNX file cut at its roundings: their results are inputs, and what they would have rounded is output."""

    def __init__(self, content: bytes, bits: int | None, activations: Collection[str]) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_stretches`."""
        model = onnx.load_from_string(content)
        cut = [node for node in model.graph.node if node.op_type == "Round" and node.output[0] in activations]
        for node in cut:
            model.graph.node.remove(node)
            model.graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
            model.graph.output.append(onnx.ValueInfoProto(name=node.input[0]))
        self._names = [node.output[0] for node in cut]
        self._session = OnnxSession(model.SerializeToString(), bits=bits)

    def __call__(self, inputs: Inputs, levels: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs, *rounded = self._session.run(inputs, {name: levels[name] for name in self._names})
        return outputs, dict(zip(self._names, rounded, strict=True))


def _layer_outputs(model: onnx.ModelProto) -> list[str]:
    """The last value of each module that computes with floats: names without an operator behind a slash."""
    ends = {value.name for value in model.graph.output}
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type in _KEPT_OPERATORS and "/" not in node.output[0] and node.output[0] not in ends
        if not node.output[0].endswith(".weight")
    ]
