"""Files changed in one place, at random but repeatably, so that they compute something else."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tqexport.backends.tflite.file import unpack
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.flatbuffer_writing import serialise

__all__ = ["mutated_onnx", "mutated_tflite"]

_ONNX_SWAPS = {"Add": "Sub", "Mul": "Div", "Div": "Mul", "Round": "Floor", "Clip": "Relu", "BitShift": "Add"}
_TFLITE_SWAPS = {"ADD": "SUB", "MUL": "DIV", "DIV": "MUL", "ROUND": "FLOOR", "RELU": "RELU6"}
_FACTORS = (1 + 1e-6, 1.0001, 1.01, 1.1, -1.0, 0.0)


def mutated_onnx(content: bytes, random: Random) -> tuple[str, bytes]:
    """What was changed in an ONNX file, and the file with another constant, attribute, operator or wire."""
    model = onnx.load_from_string(content)
    change = random.choice((_onnx_constant, _onnx_constant, _onnx_constant, _onnx_attribute, _onnx_wire, _onnx_node))
    return change(model.graph, random), model.SerializeToString()


def mutated_tflite(content: bytes, random: Random, bits: int | None = None) -> tuple[str, bytes]:
    """The same of a TFLite file; of a run-time file, in the network of a width."""
    model, _ = unpack(content)
    flat = FlatModel.__new__(FlatModel)  # it unpacks files with one network alone
    flat.model, flat.graph = model, model.subgraphs[0]
    if bits is not None:
        keys = (f"w{bits}", f"w{bits}".encode())
        (place,) = (entry.subgraphIndex for entry in model.signatureDefs if entry.signatureKey in keys)
        flat.graph = model.subgraphs[place]
    change = random.choice((_constant, _constant, _grid, _option, _wire, _operator))
    return change(flat, random), serialise(model)


def _changed(value: Any, random: Random) -> tuple[str, Any]:
    """What was done to a value, and another one of its type and shape."""
    flat = value.reshape(-1).copy()
    place = random.randrange(value.size)
    if value.dtype.kind != "f":
        what = random.choice(("another bit", "one more", "swapped"))
        if what == "swapped":
            other = random.randrange(value.size)
            flat[place], flat[other] = flat[other], flat[place]
        elif what == "another bit":
            flat[place] ^= value.dtype.type(1 << random.randrange(7))
        else:
            at_end = flat[place] == np.iinfo(value.dtype).max
            flat[place] = flat[place] - 1 if at_end else flat[place] + 1
        return f"{what} at {place}", flat.reshape(value.shape)
    factor = random.choice(_FACTORS)
    if random.random() < 0.1:
        return "rolled", np.roll(flat, 1).reshape(value.shape)
    if random.random() < 0.5:
        flat[place] *= value.dtype.type(factor)
        return f"x {factor} at {place}", flat.reshape(value.shape)
    return f"x {factor}", value * value.dtype.type(factor)


def _onnx_constant(graph: onnx.GraphProto, random: Random) -> str:
    tensor = random.choice(list(graph.initializer))
    what, value = _changed(numpy_helper.to_array(tensor), random)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value).reshape(tuple(tensor.dims)), tensor.name))
    return f"{tensor.name} {what}"


def _onnx_attribute(graph: onnx.GraphProto, random: Random) -> str:
    node = random.choice([node for node in graph.node if node.attribute])
    attribute = random.choice(list(node.attribute))
    value = helper.get_attribute_value(attribute)
    if isinstance(value, list):
        value = [value[0] + 1, *value[1:]]
    elif isinstance(value, bytes):
        value = {b"RIGHT": b"LEFT"}.get(value, b"VALID")
    else:
        value = value * 1.5 if isinstance(value, float) else value + 1
    attribute.CopyFrom(helper.make_attribute(attribute.name, value))
    return f"{node.name}.{attribute.name} = {value!r}"


def _onnx_wire(graph: onnx.GraphProto, random: Random) -> str:
    position = random.randrange(len(graph.node))
    node = graph.node[position]
    slot = random.randrange(len(node.input))
    old = node.input[slot]
    if random.random() < 0.2 and node.op_type == "Gemm":
        del node.input[2:]
        return f"{node.name} without its bias"
    kinds = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    like = [name for name, kind in kinds.items() if kind == kinds.get(old) and name != old]
    before = [name for other in graph.node[:position] for name in other.output if name != old]
    node.input[slot] = random.choice(like or before or ["input"])
    return f"{node.name} reads {node.input[slot]} instead of {old}"


def _onnx_node(graph: onnx.GraphProto, random: Random) -> str:
    position = random.randrange(len(graph.node))
    node = graph.node[position]
    how = random.random()
    if how < 0.3 and node.op_type in _ONNX_SWAPS:
        node.op_type = _ONNX_SWAPS[node.op_type]
        del node.attribute[:]
        if node.op_type == "Relu":
            del node.input[1:]
        return f"{node.name} is {node.op_type}"
    if how < 0.6:
        for other in graph.node:
            other.input[:] = [node.input[0] if name == node.output[0] else name for name in other.input]
        return f"{node.name} left out"
    number = np.float32(random.choice((1.0001, 1.01, 1.5)))
    graph.initializer.append(numpy_helper.from_array(np.array(number), "a factor"))
    name, node.output[0] = node.output[0], "not scaled"
    graph.node.insert(position + 1, helper.make_node("Mul", ["not scaled", "a factor"], [name], "scaled"))
    return f"{node.name} scaled by {number}"


def _constant(flat: FlatModel, random: Random) -> str:
    used = sorted({int(i) for operator in flat.graph.operators for i in operator.inputs if i >= 0})
    index = random.choice([i for i in used if flat.constant(i) is not None])
    what, value = _changed(flat.constant(index), random)
    flat.set_constant(index, np.ascontiguousarray(value))
    return f"{flat.name(index)} {what}"


def _grid(flat: FlatModel, random: Random) -> str:
    on_grids = [t for t in flat.graph.tensors if t.quantization is not None and t.quantization.scale is not None]
    if not on_grids:
        return _constant(flat, random)
    tensor = random.choice(on_grids)
    tensor.quantization = copy.copy(tensor.quantization)
    what, tensor.quantization.scale = _changed(np.asarray(tensor.quantization.scale), random)
    return f"scale of {tensor.name} {what}"


def _option(flat: FlatModel, random: Random) -> str:
    operator = random.choice([operator for operator in flat.graph.operators if operator.builtinOptions is not None])
    options = operator.builtinOptions = copy.copy(operator.builtinOptions)
    names = [name for name, value in vars(options).items() if isinstance(value, (int, bool, np.integer))]
    if not names:
        return _wire(flat, random)
    name = random.choice(names)
    old = getattr(options, name)
    setattr(options, name, not old if isinstance(old, bool) else 1 - int(old) if name == "padding" else int(old) + 1)
    return f"{flat.operator_name(operator)}.{name} was {old}"


def _wire(flat: FlatModel, random: Random) -> str:
    position = random.randrange(len(flat.graph.operators))
    operator = flat.graph.operators[position]
    slot = random.randrange(len(operator.inputs))
    old = int(operator.inputs[slot])
    seen = {int(i) for other in flat.graph.operators[:position] for i in (*other.inputs, *other.outputs)}
    like = [
        i
        for i in sorted(seen - {old, -1})
        if (flat.shape(i), flat.tensor(i).type) == (flat.shape(old), flat.tensor(old).type)
    ]
    if not like:
        return _constant(flat, random)
    operator.inputs = np.array(operator.inputs, np.int32)
    operator.inputs[slot] = random.choice(like)
    return f"{flat.operator_name(operator)} {position} reads {operator.inputs[slot]} instead of {old}"


def _operator(flat: FlatModel, random: Random) -> str:
    position = random.randrange(len(flat.graph.operators))
    operator = flat.graph.operators[position]
    kind = flat.operator_name(operator)
    if kind not in _TFLITE_SWAPS:
        return _option(flat, random)
    other = flat.operator(_TFLITE_SWAPS[kind], list(operator.inputs), int(operator.outputs[0]))
    operator.opcodeIndex, operator.builtinOptions, operator.builtinOptionsType = other.opcodeIndex, None, 0
    return f"{kind} {position} is {_TFLITE_SWAPS[kind]}"
