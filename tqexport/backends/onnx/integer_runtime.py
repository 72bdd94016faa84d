"""Running integer ONNX files in onnxruntime for verification, with every value's levels kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from tqexport.backends.onnx.cutting import cut_onnx
from tqexport.backends.onnx.file import parse, read_facts
from tqexport.backends.onnx.integer_form import LEVELS, render_onnx
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.onnx.web_session import WEB_RUNTIME, WebSession
from tqexport.errors import InputError
from tqexport.facts import ArtifactFacts
from tqexport.integer.arithmetic import Rounding, to_grid
from tqexport.integer.model import IntegerModel
from tqexport.integer.names import SYMMETRIC
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
            network: The integer model that it must be.
            switched: Whether it is a run-time file.

        Raises:
            InputError: onnxruntime does not take it.
        """
        self._network = network
        bits = network.bits if switched else None
        self._names = [operation.output for operation in network.operations]
        file = parse(content)
        self._symmetric = _kernel_of(file) == SYMMETRIC
        kind = TensorProto.INT8 if self._symmetric else TensorProto.UINT8
        file.graph.output.extend(helper.make_tensor_value_info(name + LEVELS, kind, None) for name in self._names)
        self._traced = self._open(file.SerializeToString(), bits=bits)
        self._untouched = self._open(content, bits=bits)
        fixed = parse(cut_onnx(content, network.bits)) if switched else file
        self.differing = tuple(_differing(network, fixed))

    def run(self, inputs: Inputs) -> IntegerRun:
        _, *levels = self._traced.run((inputs,))
        values = {INPUT: to_grid(inputs, self._network.grids[INPUT])}
        for name, value in zip(self._names, levels, strict=True):
            zero = self._network.grids[name].zero_point if self._symmetric else 0
            values[name] = (value.astype(np.int16) + zero).astype(np.uint8)
        return IntegerRun(values, self.run_untouched(inputs))

    def run_untouched(self, inputs: Inputs) -> Levels:
        return to_grid(self._untouched.run((inputs,))[0], self._network.grids[self._network.output])


class IntegerWebRuntime(IntegerOnnxRuntime):
    """The same in onnxruntime-web."""

    key, name = "web", WEB_RUNTIME
    rounding = "web"
    _open = WebSession

    def latency(self, sample: Inputs) -> float:
        assert isinstance(self._untouched, WebSession)
        return self._untouched.latency((sample,))


def _kernel_of(file: onnx.ModelProto) -> str | None:
    """The kernel that a fixed file says it is of; a run-time file is of several fixed ones."""
    facts = read_facts(file)
    return facts.kernel if isinstance(facts, ArtifactFacts) else None


def _differing(network: IntegerModel, file: onnx.ModelProto) -> Iterator[str]:
    """Names of the constants and nodes that a fixed file has otherwise than a fresh export, lacks, or has besides."""
    facts = read_facts(file)
    stored = {tensor.name: tensor for tensor in file.graph.initializer}
    fused = any(node.op_type == "QLinearConv" for node in file.graph.node)
    if not isinstance(facts, ArtifactFacts):
        raise InputError("the file holds several widths, and its manifest says one; export it again")
    fresh = parse(render_onnx(network, facts, fused=fused)).graph
    for tensor in fresh.initializer:
        if tensor.name not in stored or not _equal(stored[tensor.name], tensor):
            yield tensor.name
    # A node that reads another constant than its own computes something else, equal as all constants may be.
    nodes = {node.output[0]: node for node in file.graph.node if node.output}
    for node in fresh.node:
        own = nodes.pop(node.output[0], None)
        if own is None or _meaning(own) != _meaning(node):
            yield node.output[0]
    yield from nodes


def _meaning(node: onnx.NodeProto) -> tuple[object, ...]:
    """What a node does to what: all but its name and its description."""
    attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    return node.domain, node.op_type, list(node.input), list(node.output), attributes


def _equal(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    """Whether two constants have the same type, shape and values."""
    value, expected = numpy_helper.to_array(one), numpy_helper.to_array(other)
    return value.dtype == expected.dtype and np.array_equal(value, expected)
