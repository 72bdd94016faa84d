"""Does the network that the converter wrote compute what it was given? And where are its channels?

onnx2tf guesses which axis holds channels, and on some operators it guesses wrong without a word. So the converted graph
is run once against onnxruntime before anything is made of it, with so many activation levels that rounding does not
matter. The run also shows which values of three axes or more keep PyTorch's order in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.grouping import of_first_samples
from tqexport.backends.onnx.samples_apart import (
    ends_and_batches,
    rounded_values,
    run_on,
    samples_not_apart,
    steps_found,
)
from tqexport.backends.running import other_orders
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.layout import to_channels_first, to_channels_last
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.errors import ConversionError, about
from tqexport.layer_kinds import ONNX_OPERATORS

__all__ = ["layout_of_values", "refuse_changed_weights", "refuse_operators"]

_TOLERANCE = 1e-4  # of a value's largest element; 114 right networks are off by 4e-5 at most
_GROWTH = 30  # times the largest error before it: rounding errors grow on their way through a deep network

_ORDINARY = {*ONNX_OPERATORS, "Add", "BatchNormalization", "Clip", "Div", "Flatten", "Identity", "Mul", "Relu", "Round"}
# What onnx2tf converts, but to what plain TFLite files cannot hold.
_INTO_PARTS = {"Slice", "Split"}  # what takes a weight to pieces
_MOVES = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_SCALES = {"Div", "Mul"}  # the converter makes one filter of both
_BEYOND_TFLITE = {
    *("Col2Im", "Det", "Erf", "GRU", "GridSample", "If", "LSTM", "Loop", "NonMaxSuppression", "RNN", "Scan"),
}

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

Array = npt.NDArray[Any]


def refuse_operators(model: onnx.ModelProto) -> None:
    """Refuse a network that cannot be converted before the time is spent on trying.

    Raises:
        ConversionError: It has an operator that onnx2tf or TFLite lacks; it names each place.
    """
    spec = find_spec("onnx2tf")
    folders = [Path(folder, "ops") for folder in (spec and spec.submodule_search_locations) or ()]
    known = {file.stem for folder in folders for file in folder.glob("*.py")}
    lacking: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type not in known or node.op_type in _BEYOND_TFLITE:
            lacking.setdefault(node.op_type, []).append(node.name)
    if lacking:
        places = "; ".join(f"{kind} ({', '.join(names[:3])})" for kind, names in lacking.items())
        raise ConversionError(
            f"the network has operators that TFLite does not: {places}; replace them, or deploy the network as ONNX"
        )


def refuse_changed_weights(model: onnx.ModelProto, weights: Iterable[CodedWeight]) -> None:
    """Refuse a network whose quantised weights are not filters of a sample, before the time is spent on converting it.

    Args:
        model: With float32 weights by the names of ``weights``.
        weights: The quantised ones.

    Raises:
        ConversionError: An operator reads a part of a weight, or computes another from it; it names the layer.
    """
    layers = {weight.name: weight.layer for weight in weights}  # by the name of a weight, and of what is moved of it
    for node in model.graph.node:
        layer = next((layers[name] for name in node.input if name in layers), None)
        if layer is None or node.op_type in _SCALES:
            continue
        if node.op_type in _MOVES:
            layers[node.output[0]] = layer
            continue
        grouped = any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute)
        if node.op_type in _INTO_PARTS or (node.op_type == "ConvTranspose" and grouped):
            does, whole = "multiplies with parts of its weight", "whole"
        elif node.op_type in ONNX_OPERATORS:
            continue
        else:
            does, whole = "computes another weight from its own", "as they are"
        raise ConversionError(
            f"layer {layer} {does}, by {node.op_type} ({node.name}), and a filter in TFLite has its codes {whole}; "
            "keep the layer in float, or deploy the network as ONNX"
        )


def layout_of_values(model: onnx.ModelProto, flat: FlatModel) -> tuple[list[str], dict[str, int]]:
    """Run a network before and after conversion, and compare its output and its rounded activations.

    Args:
        model: The network as the converter got it, for its batch, with fine levels: where they are few, rounding may go
            either way.
        flat: As the converter wrote it, values named as in ``model``; left as it is.

    Returns:
        Names of the values of three axes or more that have the same axis order in both; all others are channels last
        in the file. And by name, how often all samples come one behind the other in the file, where it is several
        times; see :func:`tqexport.backends.grouping.of_first_samples`.

    Raises:
        ConversionError: The two compute different things, or samples of a batch are not independent, or not in front in
            an output.
    """
    in_same_order, steps_in_front = [], {}
    rounded = rounded_values(model)
    worst = 0.0
    for name, expected, converted, steps in _values(model, flat):
        if steps > 1:
            steps_in_front[name] = steps
        if expected.size != converted.size:
            raise ConversionError(
                f"the converter gave {name} the shape {converted.shape}, where it is {expected.shape}"
            )
        largest = max(float(np.abs(expected).max()), 1e-30)
        same, moved = (
            float(np.abs(expected - value.reshape(expected.shape)).max()) / largest
            for value in (converted, to_channels_first(converted))
        )
        kept_shape = converted.shape == expected.shape != to_channels_last(expected).shape
        if same < moved or (same == moved and kept_shape):  # which are one where all its elements are
            in_same_order.append(name)
        joined = (np.abs(expected - order).max() / largest for order in other_orders(converted, expected.shape))
        error = min(same, moved, *map(float, joined))
        one_level = 1 / largest if name in rounded else 0.0  # a value between two may be rounded either way
        if not error <= max(_TOLERANCE, _GROWTH * worst) + one_level:
            raise ConversionError(
                f"onnx2tf changed what the network computes: {name} is off by {error:.2%} of its largest value"
                f"{_suspects(model, name)}; replace the operator, or deploy the network as ONNX"
            )
        worst = max(worst, error - one_level)
    return in_same_order, steps_in_front


def _values(model: onnx.ModelProto, flat: FlatModel) -> Iterator[tuple[str, Array, Array, int]]:
    """Name, value by onnxruntime, value by LiteRT, and how many steps the file has in front of the samples.

    Activations come first, in the order they are computed. Values are as those of one sample at a time.
    """
    rounds, outputs, batches = ends_and_batches(model)
    samples = len(batches[0][0])
    expected = run_on(model, rounds, batches)
    converted = _run_tflite(flat, [tuple(map(to_channels_last, each)) for each in batches])
    for name in (*rounds, *outputs):
        if name not in converted[0]:  # the converter drops what the output does not depend on
            continue
        both = [[run[name] for run in runs] for runs in (expected, converted)]
        steps = [steps_found(name, values, samples) for values in both]
        if name in outputs and max(steps) > 1:
            raise samples_not_apart(name)
        ours, theirs = (
            of_first_samples(values[0], samples, samples, count) for values, count in zip(both, steps, strict=True)
        )
        yield name, ours, theirs, steps[1]


def _run_tflite(flat: FlatModel, batches: Sequence[Batch]) -> list[dict[str, Array]]:
    """The outputs and the rounded activations of each batch by name, by LiteRT."""
    outputs, signatures = flat.graph.outputs, flat.model.signatureDefs
    rounded = [int(operator.outputs[0]) for operator in flat.graph.operators if flat.operator_name(operator) == "ROUND"]
    flat.graph.outputs, flat.model.signatureDefs = np.array([*outputs, *rounded], np.int32), None
    try:
        with about("LiteRT does not run what onnx2tf wrote:", ConversionError):
            session = LiteRTSession(flat.pack())
            session.check(batches[0])
            return [dict(zip(session.output_names, session.run_group(*batch), strict=True)) for batch in batches]
    finally:
        flat.graph.outputs, flat.model.signatureDefs = outputs, signatures


def _suspects(model: onnx.ModelProto, name: str) -> str:
    """The less ordinary operators between a value and the activations before it."""
    producers = {output: node for node in model.graph.node for output in node.output}
    waiting, seen = [name], set()
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.name in seen or (node.op_type == "Round" and node.output[0] != name):
            continue
        seen.add(node.name)
        waiting.extend(node.input)
    unusual = [node for node in model.graph.node if node.name in seen and node.op_type not in _ORDINARY]
    return f", by {', '.join(f'{node.op_type} ({node.name})' for node in unusual[:5])}" if unusual else ""
