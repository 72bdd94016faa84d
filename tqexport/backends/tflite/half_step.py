"""Adding a constant to the integers of a filter: ``conv(x, scale * (q + k))``, where q is stored and k is not 0.

Four exact ways, each where it costs least:

* **a sum**: of what is looked up, rows of ``scale * q``, by an ADD of ``scale * k``.
* **a wider input**: ``conv(x, q + k) = conv([x, k * sum(x)], [q, 1])``, the sum over the input channels. It handles
  padding, stride and dilation, and needs a filter that runs over all channels.
* **odd integers**, at 8 bits where it does not (depthwise, grouped): ``2 q + 1`` is exact in float16, and their scale
  is applied to the result. As many bytes as int8 and a second filter, half the time.
* **a second filter** of ones, whose result is added: in all other cases, and where integers multiply data that
  are rounded to 8 bits: with a sum among the channels, that rounding would be too coarse for the other channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.tflite.filter_storage import store_dequantized
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator
from tqexport.backends.tflite.integers import CONSTANT_SUFFIX, IntegerFilter
from tqexport.layer_kinds import FILTER_OPERATORS, FilterOperator

__all__ = ["add_second_filter", "add_to_result", "can_scale_results", "scale_result", "widen_input"]

_LARGEST_BIAS = 1e18  # after division by its scale; a gain of all but 0 would make it overflow
_SMALLEST_SCALE = 1e-30
_SUMMANDS = ("main", "constant")  # of the names of the two results that a second filter adds up


def widen_input(flat: FlatModel, readers: Sequence[Operator], form: IntegerFilter) -> npt.NDArray[np.int8]:
    """Append ``k * sum over channels`` to the readers' input, once for each k.

    Returns:
        The integers of the wider filter, int8 (output channels, more input channels, *window).
    """
    stored = form.integers
    values = np.unique(form.constants[form.constants != 0])
    for value in values:
        column = (form.constants == value).astype(np.int8).reshape(-1, *[1] * (stored.ndim - 1))
        stored = np.concatenate([stored, np.broadcast_to(column, (len(stored), 1, *stored.shape[2:]))], axis=1)
    for reader in readers:
        _widen(flat, reader, values)
    return stored


def add_second_filter(
    flat: FlatModel, readers: Sequence[Operator], form: IntegerFilter, operator: str, name: str, *, by_sum: bool
) -> None:
    """Add ``conv(x, scale * k)`` to the readers' results, by a second filter of ones and an ADD.

    Args:
        flat: The file; changed in place.
        readers: The operators that read the filter.
        form: The filter.
        operator: Name of these operators.
        name: Name of the weight.
        by_sum: Let the second filter read the sum over the input channels instead of all of them.
    """
    signs = np.sign(form.constants).astype(np.int8).reshape(-1, *[1] * (form.integers.ndim - 1))
    shape = (len(form.integers), 1, *form.integers.shape[2:]) if by_sum else form.integers.shape
    ones = np.ones(shape, np.int8) * signs
    scales = np.maximum(form.scales * np.abs(form.constants).astype(np.float32), _SMALLEST_SCALE)
    layout, filter_name = FILTER_OPERATORS[operator], f"{name}{CONSTANT_SUFFIX}"
    for reader in readers:
        source = _channel_sum(flat, reader, layout) if by_sum else int(reader.inputs[layout.data])
        output = int(reader.outputs[0])
        filter_ = flat.add_tensor(filter_name, ())
        store_dequantized(flat, filter_, layout, filter_name, ones, scales)
        main, part = (flat.add_like(f"{flat.name(output)}/{suffix}", output, len(ones)) for suffix in _SUMMANDS)
        second = copy.copy(reader)
        no_bias = flat.add_constant(f"{name}/no_bias", np.zeros(len(scales), np.float32))
        inputs = _with_input(_with_input(reader.inputs, layout.data, source), layout.filter, filter_)
        second.inputs = _with_input(inputs[: layout.bias], layout.bias, no_bias)
        second.outputs = np.array([part], np.int32)
        addition = schema.AddOptionsT()
        _move_activation(reader, addition)
        reader.outputs = np.array([main], np.int32)
        flat.insert_after(reader, [second, flat.operator("ADD", [main, part], output, addition)])


def add_to_result(flat: FlatModel, reader: Operator, form: IntegerFilter, name: str) -> None:
    """Add ``scale * k`` to the rows that an operator looks up."""
    output = int(reader.outputs[0])
    rows = flat.add_like(f"{flat.name(output)}/rows", output, len(form.scales))
    reader.outputs = np.array([rows], np.int32)
    constant = flat.add_constant(f"{name}{CONSTANT_SUFFIX}", (form.scales * form.constants).astype(np.float32))
    flat.insert_after(reader, [flat.operator("ADD", [rows, constant], output, schema.AddOptionsT())])


def can_scale_results(flat: FlatModel, readers: Sequence[Operator], scales: npt.NDArray[np.float32]) -> bool:
    """Whether :func:`scale_result` applies: biases must bear being divided by the scales."""
    biases = [flat.constant(_bias(flat, reader)) for reader in readers if _bias(flat, reader) >= 0]
    with np.errstate(over="ignore"):
        return all(bias is not None and bool((np.abs(bias / scales) < _LARGEST_BIAS).all()) for bias in biases)


def scale_result(flat: FlatModel, reader: Operator, scales: npt.NDArray[np.float32], name: str) -> None:
    """Multiply an operator's result, without its activation function, by a scale per output channel."""
    output = int(reader.outputs[0])
    unscaled = flat.add_like(f"{flat.name(output)}/unscaled", output, len(scales))
    slot = FILTER_OPERATORS[flat.operator_name(reader)].bias
    if _bias(flat, reader) >= 0:
        bias = flat.constant(_bias(flat, reader))
        assert bias is not None  # can_scale_results
        divided = flat.add_constant(f"{name}/unscaled_bias", (bias / scales).astype(np.float32))
        reader.inputs = _with_input(reader.inputs, slot, divided)
    options = schema.MulOptionsT()
    _move_activation(reader, options)
    reader.outputs = np.array([unscaled], np.int32)
    factor = flat.add_constant(f"{name}/scale", scales)
    flat.insert_after(reader, [flat.operator("MUL", [unscaled, factor], output, options)])


def _widen(flat: FlatModel, reader: Operator, multiples: npt.NDArray[np.float64]) -> None:
    """Let an operator read its input with multiples of the channel sum behind it; readers of one input share that."""
    layout = FILTER_OPERATORS[flat.operator_name(reader)]
    source = int(reader.inputs[layout.data])
    name = f"{flat.name(source)}/with_sum_{'_'.join(f'{value:.9g}' for value in multiples)}"
    widened = flat.find(name)
    if widened is None:
        total = _channel_sum(flat, reader, layout)
        operators, parts = [], [source]
        for value in multiples:
            parts.append(flat.add_like(f"{flat.name(source)}/{value:.9g}_sum", source, 1))
            factor = flat.add_constant(f"{value:.9g}", np.array([value], np.float32))
            operators.append(flat.operator("MUL", [total, factor], parts[-1], schema.MulOptionsT()))
        widened = flat.add_like(name, source, flat.shape(source)[-1] + len(multiples))
        options = schema.ConcatenationOptionsT(len(flat.shape(source)) - 1)
        operators.append(flat.operator("CONCATENATION", parts, widened, options))
        flat.insert_before(reader, operators)
    reader.inputs = _with_input(reader.inputs, layout.data, widened)


def _channel_sum(flat: FlatModel, reader: Operator, layout: FilterOperator) -> int:
    """The sum over the channels of an operator's input; readers of one input share it."""
    source = int(reader.inputs[layout.data])
    name = f"{flat.name(source)}/sum"
    total = flat.find(name)
    if total is None:
        total = flat.add_like(name, source, 1)
        axis = flat.add_constant("last_axis", np.array([len(flat.shape(source)) - 1], np.int32))
        flat.insert_before(reader, [flat.operator("SUM", [source, axis], total, schema.ReducerOptionsT(keepDims=True))])
    return total


def _move_activation(reader: Operator, options: Any) -> None:
    """Let another operator, which comes last, apply the activation function."""
    options.fusedActivationFunction = reader.builtinOptions.fusedActivationFunction
    reader.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE


def _bias(flat: FlatModel, reader: Operator) -> int:
    """Tensor of an operator's bias, -1 where it has none."""
    slot = FILTER_OPERATORS[flat.operator_name(reader)].bias
    return int(reader.inputs[slot]) if len(reader.inputs) > slot else -1


def _with_input(inputs: Any, slot: int, tensor: int) -> npt.NDArray[np.int32]:
    """An operator's inputs with one of them replaced, or one more behind them."""
    return np.array([*inputs[:slot], tensor, *inputs[slot + 1 :]], np.int32)
