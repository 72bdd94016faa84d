"""Recurrent layers written out step by step, as TFLite can have them.

TFLite has an LSTM operator, whose weights cannot be codes, and no GRU. So each LSTM and GRU of an ONNX graph becomes
the products, sums and gates that it stands for, once for every step (the formulas of ``torch.nn.LSTM`` and
``torch.nn.GRU``). All steps read the same weights; the product with the input weights is one, of all steps together.

The operators of ONNX want the rows of the weights in another order than PyTorch's. The exporter puts them in that order
as the file runs; here the parameters are taken from before that, as PyTorch has them: i, f, g, o of an LSTM, and r, z,
n of a GRU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from tqexport.backends.onnx.file import CONSTANT_PREFIX
from tqexport.backends.tflite.onnx_writing import Place, Values, Writer, rewritten
from tqexport.errors import ConversionError

__all__ = ["MOST_STEPS", "unrolled"]

MOST_STEPS = 128
_DIRECTIONS = {b"forward": (False,), b"reverse": (True,), b"bidirectional": (False, True)}  # is each backwards?
_USUAL = {  # attributes as PyTorch's layers have them
    "LSTM": {"layout": 0, "input_forget": 0},
    "GRU": {"layout": 0, "linear_before_reset": 1},
}
_REORDERING = {"Concat", "Slice", "Unsqueeze"}
_WEIGHTS = slice(1, 4)  # among the inputs: for the input, for the state, and biases
_LENGTHS, _STATE, _PEEPHOLES = 4, 5, 7


def unrolled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with each LSTM and GRU written out.

    Args:
        model: A network with float32 weights, whose sizes are all known; it is not changed.

    Returns:
        The network. What is no layer of PyTorch stays as it is.

    Raises:
        ConversionError: A layer has too many steps.
    """

    def write(place: Place) -> Writer | None:
        layer = _layer_of(place.node, place.shape, place.values, place.producers)
        if layer is None:
            return None
        writer = Writer(place.node.name)
        _write(writer, layer, place.values)
        return writer

    return rewritten(model, tuple(_USUAL), write)


@dataclass(frozen=True)
class _Layer:
    """An LSTM or GRU.

    Attributes:
        node: The operator.
        shape: Of its input: steps, batch, channels.
        backwards: For each direction, whether it starts at the last step.
        parameters: For each direction, names of the weights for the input and for the state, and of their biases, if
            there are any.
    """

    node: onnx.NodeProto
    shape: tuple[int, ...]
    backwards: tuple[bool, ...]
    parameters: tuple[tuple[str, ...], ...]

    def state(self, number: int) -> str:
        """Name of the first state, (directions, batch, size), or of the first cell; empty where that is zeros."""
        place = _STATE + number
        return str(self.node.input[place]) if len(self.node.input) > place else ""


def _layer_of(
    node: onnx.NodeProto, shape: tuple[int, ...], values: Values, producers: Mapping[str, onnx.NodeProto]
) -> _Layer | None:
    """The layer that an operator is; None where it is none that PyTorch has.

    Raises:
        ConversionError: It has too many steps.
    """
    if node.op_type not in _USUAL:
        return None
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    backwards = _DIRECTIONS.get(attributes.pop("direction", b"forward"), ())
    attributes.pop("hidden_size", None)
    inputs = [*node.input, *[""] * _PEEPHOLES][: _PEEPHOLES + 1]
    weights = [_parameters_of(name, values, producers) for name in inputs[_WEIGHTS]]
    count = len(backwards)
    if (
        not all(_USUAL[node.op_type].get(name) == value for name, value in attributes.items())
        or (node.op_type == "GRU" and "linear_before_reset" not in attributes)
        or not backwards
        or not (shape and all(shape))
        or [len(part) for part in weights] not in ([count, count, 0], [count, count, 2 * count])
        or inputs[_LENGTHS]
        or inputs[_PEEPHOLES]
    ):
        return None
    if shape[0] > MOST_STEPS:
        raise ConversionError(
            f"{node.name} goes through {shape[0]} steps, and a TFLite file has each of them written out, {MOST_STEPS} "
            "at most; take shorter sequences, or deploy the network as ONNX"
        )
    into, back, biases = weights
    parameters = tuple((into[i], back[i], *biases[2 * i : 2 * i + 2]) for i in range(count))
    return _Layer(node, shape, backwards, parameters)


def _parameters_of(name: str, values: Values, producers: Mapping[str, onnx.NodeProto]) -> list[str]:
    """The parameters of the network that a value is put together of, in order."""
    if name in values:
        return [] if name.startswith(CONSTANT_PREFIX) else [name]
    node = producers.get(name)
    if node is None or node.op_type not in _REORDERING:
        return []
    return [*dict.fromkeys(part for source in node.input for part in _parameters_of(source, values, producers))]


def _write(writer: Writer, layer: _Layer, values: Values) -> None:
    """Write a layer out."""
    steps, batch, _ = layer.shape
    size = values[layer.parameters[0][1]].shape[1]
    directions = [_direction(writer, layer, values, number) for number in range(len(layer.backwards))]
    shapes = ([steps, 1, batch, size], [1, batch, size], [1, batch, size])
    for output, shape, parts in zip(layer.node.output, shapes, zip(*directions, strict=True), strict=False):
        if output:
            shaped = [writer.reshape(part, shape) for part in parts]
            writer.add("Concat", *shaped, output=output, axis=len(shape) - 3)


def _direction(writer: Writer, layer: _Layer, values: Values, number: int) -> tuple[str, ...]:
    """Write one direction; returns the states of all steps, one below the other, the last state, and the last cell."""
    into, back, *biases = layer.parameters[number]
    steps, batch, channels = layer.shape
    size = values[back].shape[1]
    states = [_first_state(writer, layer.state(i), values, number, (batch, size)) for i in range(2)]
    rows = writer.reshape(layer.node.input[0], (steps * batch, channels))
    entering = writer.add("Gemm", rows, into, *biases[:1], transB=1)
    lstm = layer.node.op_type == "LSTM"
    parts = [entering] if lstm else writer.split(entering, [2 * size, size], 1)
    by_step = [*zip(*(writer.split(part, [batch] * steps, 0) for part in parts), strict=True)]
    outputs = []
    for entered in reversed(by_step) if layer.backwards[number] else by_step:
        if lstm:
            states = _lstm_step(writer, entered[0], states, (back, *biases[1:]), size)
        else:
            states = [_gru_step(writer, entered, states[0], (back, *biases[1:]), values), ""]
        outputs.append(states[0])
    if layer.backwards[number]:
        outputs.reverse()
    return (writer.add("Concat", *outputs, axis=0), *states)


def _first_state(writer: Writer, name: str, values: Values, number: int, shape: tuple[int, int]) -> str:
    """The state of a direction before the first step, (batch, size); empty for zeros."""
    if not name or (name in values and not values[name].any()):
        return ""
    start, end, axis = (writer.constant([place]) for place in (number, number + 1, 0))
    return writer.reshape(writer.add("Slice", name, start, end, axis), shape)


def _lstm_step(writer: Writer, entered: str, states: Sequence[str], parameters: Sequence[str], size: int) -> list[str]:
    """One step of an LSTM; an empty state is zeros, whose product no converter has to make a constant of."""
    state, cell = states
    back, *bias = parameters
    if state:
        entered = writer.add("Add", entered, writer.add("Gemm", state, back, *bias, transB=1))
    elif bias:
        entered = writer.add("Add", entered, bias[0])
    enter, keep, new, show = writer.split(entered, [size] * 4, 1)
    added = writer.add("Mul", writer.add("Sigmoid", enter), writer.add("Tanh", new))
    cell = writer.add("Add", writer.add("Mul", writer.add("Sigmoid", keep), cell), added) if cell else added
    return [writer.add("Mul", writer.add("Sigmoid", show), writer.add("Tanh", cell)), cell]


def _gru_step(writer: Writer, entered: Sequence[str], state: str, parameters: Sequence[str], values: Values) -> str:
    """One step of a GRU; an empty state is zeros, as in :func:`_lstm_step`."""
    back, *bias = parameters
    size = values[back].shape[1]
    gates, new = entered
    if state:
        both = writer.add("Gemm", state, back, *bias, transB=1)
        to_gates, to_new = writer.split(both, [2 * size, size], 1)
    elif bias:  # parameters of their own, as the converter would cut the constant in two
        to_gates, to_new = f"{bias[0]}/gates", f"{bias[0]}/new"
        writer.constants |= {to_gates: values[bias[0]][: 2 * size], to_new: values[bias[0]][2 * size :]}
    if state or bias:
        gates = writer.add("Add", gates, to_gates)
    reset, update = writer.split(writer.add("Sigmoid", gates), [size] * 2, 1)
    if state or bias:
        new = writer.add("Add", new, writer.add("Mul", reset, to_new))
    new = writer.add("Tanh", new)
    if not state:
        return writer.add("Sub", new, writer.add("Mul", update, new))
    return writer.add("Add", writer.add("Mul", writer.add("Sub", state, new), update), new)
