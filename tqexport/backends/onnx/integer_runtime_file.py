"""One ONNX file of integers for every width up to 7 bits, switched by the input ``bits``.

The fixed files of these widths share one graph and differ in small initializers, which the run-time file takes from
tables as ``backends/onnx/runtime_file.py`` describes. At 8 bits layers read their input twice, which is another graph:
that width is a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

from tqexport.backends.onnx import LAYOUT
from tqexport.backends.onnx.integer_form import render_onnx
from tqexport.backends.onnx.runtime_file import SCALAR_PREFIX, merge_onnx
from tqexport.errors import InputError
from tqexport.facts import facts_of_model
from tqexport.integer.build import integer_model
from tqexport.integer.names import INTEGER
from tqexport.model import TruncModel
from tqexport.truncation import check_shiftable

__all__ = ["WIDEST", "runtime_integer_onnx"]

WIDEST = 7  # bits of the widest levels that fit int8
_SCALARS = {  # which inputs of an operator have no dimension
    "BitShift": (1,),
    "Clip": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 6, 7),
    "QuantizeLinear": (1, 2),
    "Sub": (1,),
}


def runtime_integer_onnx(model: TruncModel, widths: Sequence[int], batch: int | None = None) -> bytes:
    """Export a calibrated network to one file of integers that holds several widths.

    Args:
        model: See :func:`tqexport.integer.calibration.calibrate`.
        widths: At least two widths that ``model`` has, 7 bits at most.
        batch: How many samples it takes at once; None for any number.

    Returns:
        The serialised, checked file. Inputs ``input`` float32 (N, ...) and ``bits`` uint8 scalar.

    Raises:
        UsageError: Fewer than two widths.
        InputError: A width needs another graph, the checkpoint lacks it, or its codes may not be shifted.
        ConversionError: An operation has no integer form.
    """
    check_shiftable(widths, model.info.scheme.quantizer)
    if wide := [bits for bits in widths if bits > WIDEST]:
        raise InputError(
            f"{wide[0]} bits need nine-bit integers, which is another graph than that of lower widths; leave it out of "
            "the run-time file and export it as a file of its own"
        )
    files = (
        (bits, render_onnx(integer_model(model, bits), facts_of_model(model, bits, LAYOUT, INTEGER), batch, fused=True))
        for bits in sorted(set(widths))
    )
    return _with_scalars(merge_onnx(files))


def _with_scalars(content: bytes) -> bytes:
    """Give scales and zero points no dimension: pieces of a table have one, which integer operators do not take."""
    model = onnx.load_from_string(content)
    scalars = {
        name
        for node in model.graph.node
        if node.op_type in _SCALARS
        if node.op_type != "DequantizeLinear" or not node.attribute  # those with an axis are weights
        for name in (node.input[i] for i in _SCALARS[node.op_type] if i < len(node.input))
    }
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "Split":
            for position, name in enumerate(node.output):
                if name in scalars:
                    node.output[position] = SCALAR_PREFIX + name
                    nodes.append(helper.make_node("Squeeze", [SCALAR_PREFIX + name], [name], name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    result: bytes = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(result, full_check=True)
    return result
