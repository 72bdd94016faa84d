"""Running integer ONNX files in onnxruntime for verification, with every value's levels kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from tqexport.backends.onnx.file import parse
from tqexport.backends.onnx.integer_form import LEVELS
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.onnx.web_session import WEB_RUNTIME, WebSession
from tqexport.integer.arithmetic import Rounding, to_grid
from tqexport.integer.model import IntegerModel
from tqexport.integer.naming import INPUT
from tqexport.integer.runtime import IntegerRun, IntegerRuntime, Levels

__all__ = ["IntegerOnnxRuntime", "IntegerWebRuntime"]

Inputs = npt.NDArray[np.float32]


class IntegerOnnxRuntime(IntegerRuntime):
    """An integer ONNX file in onnxruntime with its default optimisations."""

    key, name = "onnxruntime", "onnxruntime"
    rounding: Rounding = "real"
    _open: ClassVar[Callable[..., OnnxSession | WebSession]] = OnnxSession

    def __init__(self, content: bytes, network: IntegerModel, *, switched: bool) -> None:
        """Open a file.

        Args:
            content: The file.
            network: The integer model that it must be. Values are looked at that have its names in the file.
            switched: Whether it is a run-time file.

        Raises:
            InputError: onnxruntime does not take it.
        """
        self._network = network
        bits = network.bits if switched else None
        self._untouched = self._open(content, bits=bits)
        file = parse(content)
        types = _types(file)
        self._names = [operation.output for operation in network.operations]
        self._traced: OnnxSession | WebSession | None = None
        if all(name + LEVELS in types for name in self._names):  # of another structure only the outputs are looked at
            outputs = [(name + LEVELS, types[name + LEVELS]) for name in self._names]
            file.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in outputs)
            self._traced = self._open(file.SerializeToString(), bits=bits)

    def run(self, inputs: Inputs) -> IntegerRun:
        outputs = self.run_untouched(inputs)
        if self._traced is None:
            return IntegerRun({}, outputs)
        _, *levels = self._traced.run((inputs,))
        values = {INPUT: to_grid(inputs, self._network.grids[INPUT])}
        for name, value in zip(self._names, levels, strict=True):
            zero = self._network.grids[name].zero_point if value.dtype == np.int8 else 0  # of the symmetric form
            values[name] = (value.astype(np.int16) + zero).astype(np.uint8)
        return IntegerRun(values, outputs)

    @property
    def batch(self) -> int | None:
        return self._untouched.batch

    def run_untouched(self, inputs: Inputs) -> Levels:
        return to_grid(self._untouched.run((inputs,))[0], self._network.grids[self._network.output])


class IntegerWebRuntime(IntegerOnnxRuntime):
    """The same in onnxruntime-web."""

    key, name = "web", WEB_RUNTIME
    rounding = "web"
    _open = WebSession

    def _seconds(self, batch: Inputs) -> float:
        assert isinstance(self._untouched, WebSession)
        return self._untouched.latency((batch,))


def _types(file: onnx.ModelProto) -> dict[str, int]:
    """By name, the type of every value that the operators of a file compute, as far as it follows from them."""
    computed = {name for node in file.graph.node for name in node.output}
    inferred = onnx.shape_inference.infer_shapes(file).graph.value_info
    return {value.name: value.type.tensor_type.elem_type for value in inferred if value.name in computed}
