"""Putting ONNX graphs together, node by node, with nothing of a network in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from tqexport.backends.onnx.file import OUTPUT_NAME, write_facts
from tqexport.facts import ArtifactFacts

__all__ = ["GraphBuilder"]

_DOMAIN_VERSION = 20
_IR_VERSION = 10


class GraphBuilder:
    """Nodes and initializers in the order they are added."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def constant(self, name: str, value: npt.NDArray[Any] | np.generic) -> str:
        """Add an initializer; the same name again must have the same value."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        known = self._initializers.setdefault(name, tensor)
        if known.SerializeToString() != tensor.SerializeToString():
            raise ValueError(f"two initializers are named {name}")
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output, named after it; returns the output's name."""
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def model(self, output_shape: Sequence[int | str], facts: ArtifactFacts) -> bytes:
        """The checked file; its graph's input and output have the names of every file of tqexport."""
        graph = helper.make_graph(
            self._nodes,
            "network",
            self._inputs,
            [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, list(output_shape))],
            list(self._initializers.values()),
        )
        opset = helper.make_opsetid("", _DOMAIN_VERSION)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="tqexport")
        write_facts(model, facts)
        content: bytes = model.SerializeToString(deterministic=True)
        onnx.checker.check_model(content, full_check=True)
        return content
