"""The fixed ONNX file of one width from a file that has several, byte for byte as a direct export makes it.

Needs onnx and numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tqexport.backends.onnx.file import BITS_NAME, parse, read_facts, rebuild, write_facts
from tqexport.backends.onnx.runtime_file import PLACES, SCALAR_PREFIX, SWITCH_PREFIX, table_names
from tqexport.backends.onnx.truncatable import put_row
from tqexport.errors import InputError
from tqexport.facts import DAMAGED, MultiWidthFacts

__all__ = ["cut_onnx"]


def cut_onnx(content: bytes, bits: int) -> bytes:
    """The fixed file of a width from a run-time file or a truncatable one.

    Args:
        content: The file.
        bits: A width that it has.

    Raises:
        InputError: It is damaged.
    """
    model = parse(content)
    facts = read_facts(model)
    if not isinstance(facts, MultiWidthFacts):
        raise InputError(DAMAGED)
    try:
        if facts.own is None:
            _take_row(model.graph, facts.tables[PLACES], facts.widths.index(bits))
        else:
            put_row(model, facts, bits)
    except (
        LookupError,
        StopIteration,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # tables of another make than ours
        raise InputError(DAMAGED) from error
    write_facts(model, facts.by_width[bits])
    fixed: bytes = model.SerializeToString(deterministic=True)
    return fixed


def _take_row(graph: onnx.GraphProto, places: Mapping[str, Any], row: int) -> None:
    """Replace the tables by the values of one width, and take the input ``bits`` away."""
    splits = {node.input[0]: list(node.output) for node in graph.node if node.op_type == "Split"}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    initializers = [tensor for tensor in graph.initializer if not tensor.name.startswith(SWITCH_PREFIX)]
    pieces: dict[int, onnx.TensorProto] = {}
    for dtype, where in places.items():
        table, split, sizes = table_names(dtype)
        lengths = numpy_helper.to_array(constants[sizes])
        values = np.split(numpy_helper.to_array(constants[table])[row], np.cumsum(lengths)[:-1])
        for number, value in enumerate(values):
            shaped = value.reshape(()) if number < where["scalars"] else value
            name = splits[split][number].removeprefix(SCALAR_PREFIX)
            pieces[where["positions"][number]] = numpy_helper.from_array(shaped, name)
    for position in sorted(pieces):
        initializers.insert(position, pieces[position])
    nodes = [node for node in graph.node if not _belongs_to_switch(node)]
    rebuild(graph, nodes, initializers)
    graph.input.remove(next(value for value in graph.input if value.name == BITS_NAME))


def _belongs_to_switch(node: onnx.NodeProto) -> bool:
    """Whether a node is there to choose the width."""
    return any(name == BITS_NAME or name.startswith(SWITCH_PREFIX) for name in node.input)
