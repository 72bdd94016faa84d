"""Running integer ONNX files in onnxruntime for verification, with every value's levels kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from tqexport.backends.onnx.cutting import cut_onnx
from tqexport.backends.onnx.file import parse
from tqexport.backends.onnx.integer_form import LEVELS
from tqexport.backends.onnx.session import OnnxSession
from tqexport.integer.arithmetic import to_grid
from tqexport.integer.halves import halves_of
from tqexport.integer.model import Convolution, IntegerModel
from tqexport.integer.naming import INPUT
from tqexport.integer.runtime import IntegerRun, IntegerRuntime, Levels

__all__ = ["IntegerOnnxRuntime"]

Inputs = npt.NDArray[np.float32]


class IntegerOnnxRuntime(IntegerRuntime):
    """An integer ONNX file in onnxruntime with its default optimisations."""

    rounding = "real"

    def __init__(self, content: bytes, network: IntegerModel, *, switched: bool) -> None:
        """Open a file.

        Args:
            content: The file.
            network: The integer model that it must be.
            switched: Whether it is a run-time file.

        Raises:
            InputError: onnxruntime does not take it.
        """
        self.name = "onnxruntime"
        self._network = network
        bits = network.bits if switched else None
        self._names = [operation.output for operation in network.operations]
        file = parse(content)
        kept = [helper.make_tensor_value_info(name + LEVELS, TensorProto.UINT8, None) for name in self._names]
        file.graph.output.extend(kept)
        self._traced = OnnxSession(file.SerializeToString(), bits=bits)
        self._untouched = OnnxSession(content, bits=bits)
        fixed = parse(cut_onnx(content, network.bits)) if switched else file
        stored = {tensor.name: tensor for tensor in fixed.graph.initializer}
        self.differing_weights = tuple(dict.fromkeys(_differing(network, stored)))

    def run(self, inputs: Inputs) -> IntegerRun:
        _, *levels = self._traced.run(inputs)
        values = {INPUT: to_grid(inputs, self._network.grids[INPUT]), **dict(zip(self._names, levels, strict=True))}
        return IntegerRun(values, self.run_untouched(inputs))

    def run_untouched(self, inputs: Inputs) -> Levels:
        return to_grid(self._untouched.run(inputs)[0], self._network.grids[self._network.output])


def _differing(network: IntegerModel, stored: Mapping[str, onnx.TensorProto]) -> Iterator[str]:
    """Names of the layers whose weights in the file are others."""
    for layer in network.operations:
        if isinstance(layer, Convolution):
            for name, expected in _expected(layer, stored):
                value = numpy_helper.to_array(stored[name]) if name in stored else None
                if value is None or value.dtype != expected.dtype or value.tobytes() != expected.tobytes():
                    yield layer.name


def _expected(
    layer: Convolution, stored: Mapping[str, onnx.TensorProto]
) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """Name and value of what the file must store of a layer's weights."""
    name = f"{layer.name}.weight"
    if f"{name}.integers" in stored:
        yield f"{name}.integers", halves_of(layer).weight if layer.wide else layer.weight.astype(np.int8)
    elif layer.codes is None:
        yield f"{name}.unsigned", layer.unsigned.astype(np.int8)
    else:
        yield f"{name}.codes", layer.codes.codes
        yield f"{name}.shift", np.array(layer.codes.shift, np.uint8)
