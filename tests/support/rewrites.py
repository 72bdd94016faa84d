"""Files rewritten as tools do it, so that they compute the same."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxsim
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

from tqexport.backends.tflite.file import single_graph, unpack
from tqexport.backends.tflite.flatbuffer_writing import serialise

__all__ = ["FIXED_ALONE", "ONNX_REWRITES", "TFLITE_REWRITES", "Rewrite"]

Rewrite = Callable[[bytes, Random], bytes]


def _on_onnx(change: Callable[[onnx.ModelProto, Random], object]) -> Rewrite:
    def rewrite(content: bytes, random: Random) -> bytes:
        model = onnx.load_from_string(content)
        changed = change(model, random)
        return (changed if isinstance(changed, onnx.ModelProto) else model).SerializeToString()

    return rewrite


def _rename(model: onnx.ModelProto, random: Random) -> None:
    numbers = {value.name: value.name for value in (*model.graph.input, *model.graph.output)} | {"": ""}

    def new(name: str) -> str:
        return numbers.setdefault(name, f"v{len(numbers)}_{random.randrange(99)}")

    for tensor in model.graph.initializer:
        tensor.name = new(tensor.name)
    for node in model.graph.node:
        node.name = f"n{random.randrange(10**9)}"
        node.input[:], node.output[:] = [new(name) for name in node.input], [new(name) for name in node.output]


def _shuffled(nodes: Iterable[Any], reads: Callable[[Any], Any], writes: Callable[[Any], Any], random: Random) -> Any:
    """Operators in another order in which they can be computed."""
    waiting = list(nodes)
    unmade = {name for node in waiting for name in writes(node)}
    while waiting:
        chosen = random.choice([node for node in waiting if not unmade & set(reads(node))])
        waiting = [node for node in waiting if node is not chosen]
        unmade -= set(writes(chosen))
        yield chosen


def _reorder(model: onnx.ModelProto, random: Random) -> None:
    graph = model.graph
    nodes = [copy.deepcopy(n) for n in _shuffled(graph.node, lambda n: n.input, lambda n: n.output, random)]
    tensors = [copy.deepcopy(tensor) for tensor in graph.initializer]
    random.shuffle(tensors)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)


def _swap_operands(model: onnx.ModelProto, random: Random) -> None:
    for node in model.graph.node:
        if node.op_type in ("Add", "Mul") and random.random() < 0.5:
            node.input[:] = node.input[::-1]


def _constants_as_nodes(model: onnx.ModelProto, _random: Random) -> None:
    graph = model.graph
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer]
    nodes += [copy.deepcopy(node) for node in graph.node]
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)


def _identities(model: onnx.ModelProto, random: Random) -> None:
    for position in reversed(range(len(model.graph.node))):
        node = model.graph.node[position]
        if random.random() < 0.3:
            name, node.output[0] = node.output[0], f"before_{position}_{random.randrange(10**9)}"
            model.graph.node.insert(position + 1, helper.make_node("Identity", [node.output[0]], [name]))


def _shifts_of_one_element(model: onnx.ModelProto, _random: Random) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".shift"):
            tensor.dims.append(1)


def _typed_data(model: onnx.ModelProto, _random: Random) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, value.shape, value.ravel().tolist()))


def _node_names_lost(model: onnx.ModelProto, _random: Random) -> None:
    for node in model.graph.node:
        node.name, node.doc_string = "", "passed through a tool"
    model.producer_name = "a tool"


def _defaults_written_out(model: onnx.ModelProto, _random: Random) -> None:
    for node in model.graph.node:
        if node.op_type == "Conv":
            given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            usual = {"group": 1, "dilations": [1, 1], "strides": [1, 1], "pads": [0] * 4}
            changed = {name: value for name, value in given.items() if value != usual.get(name)}
            changed |= {name: value for name, value in usual.items() if name not in given}
            del node.attribute[:]
            node.attribute.extend(helper.make_attribute(*item) for item in changed.items())


def _constants_copied(model: onnx.ModelProto, _random: Random) -> None:
    """Each reader gets a copy of its own of what several read."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            readers[name] = readers.get(name, 0) + 1
            if name in tensors and readers[name] > 1:
                twin = copy.deepcopy(tensors[name])
                twin.name = node.input[slot] = f"{name}#{readers[name]}"
                model.graph.initializer.append(twin)


def _optimized(content: bytes, _random: Random) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        options.log_severity_level = 3
        onnxruntime.InferenceSession(content, options)
        return Path(folder, "optimized.onnx").read_bytes()


ONNX_REWRITES: dict[str, Rewrite] = {
    "renamed": _on_onnx(_rename),
    "reordered": _on_onnx(_reorder),
    "operands swapped": _on_onnx(_swap_operands),
    "constants as nodes": _on_onnx(_constants_as_nodes),
    "Identity nodes": _on_onnx(_identities),
    "shifts of one element": _on_onnx(_shifts_of_one_element),
    "typed data": _on_onnx(_typed_data),
    "node names lost": _on_onnx(_node_names_lost),
    "defaults written out": _on_onnx(_defaults_written_out),
    "constants copied": _on_onnx(_constants_copied),
    "onnxsim": _on_onnx(lambda model, _random: onnxsim.simplify(model)[0]),
    "onnxruntime": _optimized,
}


def _on_tflite(change: Callable[[Any, Any, Random], None]) -> Rewrite:
    def rewrite(content: bytes, random: Random) -> bytes:
        model, _ = unpack(content)
        model.subgraphs = [model.subgraphs[i] for i in range(len(model.subgraphs))]
        for graph in model.subgraphs:
            change(model, graph, random)
        return serialise(model)

    return rewrite


def _rename_tensors(_model: Any, graph: Any, random: Random) -> None:
    for number, tensor in enumerate(graph.tensors):
        tensor.name = f"t{number}_{random.randrange(99)}"


def _move_tensors(model: Any, graph: Any, random: Random) -> None:
    order = list(range(len(graph.tensors)))
    random.shuffle(order)
    new = {old: position for position, old in enumerate(order)} | {-1: -1}
    graph.tensors = [graph.tensors[old] for old in order]
    for holder in (graph, *graph.operators):
        holder.inputs, holder.outputs = (
            np.array([new[int(i)] for i in part], np.int32) for part in (holder.inputs, holder.outputs)
        )
    for signature in model.signatureDefs:
        if model.subgraphs[signature.subgraphIndex] is graph:
            for entry in (*signature.inputs, *signature.outputs):
                entry.tensorIndex = new[int(entry.tensorIndex)]


def _reorder_operators(_model: Any, graph: Any, random: Random) -> None:
    graph.operators = list(
        _shuffled(graph.operators, lambda o: map(int, o.inputs), lambda o: map(int, o.outputs), random)
    )


def _scales_per_channel(model: Any, graph: Any, _random: Random) -> None:
    for tensor in graph.tensors:
        grid, constant = tensor.quantization, model.buffers[tensor.buffer].data is not None
        if constant and grid is not None and grid.scale is not None and len(grid.scale) == 1:
            count = int(tensor.shape[grid.quantizedDimension])
            grid.scale, grid.zeroPoint = np.repeat(grid.scale, count), np.repeat(grid.zeroPoint, count)


def _empty_grids(_model: Any, graph: Any, _random: Random) -> None:
    for tensor in graph.tensors:
        if tensor.quantization is None:
            tensor.quantization = schema.QuantizationParametersT()


def _unused_tensors(_model: Any, graph: Any, random: Random) -> None:
    for number in range(random.randrange(1, 5)):
        unused = schema.TensorT(np.array([1], np.int32), schema.TensorType.FLOAT32, name=f"unused{number}")
        graph.tensors.append(unused)


def _swap_summands(model: Any, graph: Any, random: Random) -> None:
    kinds = (schema.BuiltinOperator.ADD, schema.BuiltinOperator.MUL)
    for operator in graph.operators:
        if model.operatorCodes[operator.opcodeIndex].builtinCode in kinds and random.random() < 0.5:
            operator.inputs = operator.inputs[::-1].copy()


def _dequantized(content: bytes, _random: Random) -> bytes:
    """A fixed file whose filters are float32, as a tool writes it that folds constants."""
    flat, _ = single_graph(content, None)
    for operator in list(flat.graph.operators):
        source, target = int(operator.inputs[0]), int(operator.outputs[0])
        value = flat.constant(source) if flat.operator_name(operator) == "DEQUANTIZE" else None
        if value is None:
            continue
        grid, number = flat.tensor(source).quantization, value.astype(np.float32)
        if grid is not None and grid.scale is not None:
            shape = [-1 if i == grid.quantizedDimension and len(grid.scale) > 1 else 1 for i in range(value.ndim)]
            number = number * np.asarray(grid.scale, np.float32).reshape(shape)
        flat.set_constant(target, number)
        flat.graph.operators = [other for other in flat.graph.operators if other is not operator]
    return flat.pack()


TFLITE_REWRITES: dict[str, Rewrite] = {
    "renamed": _on_tflite(_rename_tensors),
    "tensors moved": _on_tflite(_move_tensors),
    "reordered": _on_tflite(_reorder_operators),
    "a scale per channel": _on_tflite(_scales_per_channel),
    "empty grids": _on_tflite(_empty_grids),
    "unused tensors": _on_tflite(_unused_tensors),
    "summands swapped": _on_tflite(_swap_summands),
    "filters de-quantised": _dequantized,
}
FIXED_ALONE = {"shifts of one element", "filters de-quantised"}  # what a run-time file has no place for
