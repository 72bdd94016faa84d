"""Rewriting a fixed ONNX file as a float network, which a converter without BitShift can take, and quickly."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.onnx.file import CONSTANT_PREFIX, rebuild
from tqexport.backends.tflite.onnx_writing import read_by_something
from tqexport.backends.tflite.provenance import Folded

__all__ = ["FloatGraph", "for_batch", "with_float_weights", "with_weights_in_shape", "without_batch_norms"]


@dataclass(frozen=True)
class FloatGraph:
    """A float network, and what its parameters were computed from.

    Attributes:
        model: The network.
        folded: By parameter name: the weight and the gain that it is the product of. Every other parameter is one of
            the network's own.
        weights: The quantised weights, some of which may be rows of one of the network's own.
    """

    model: onnx.ModelProto
    folded: Mapping[str, Folded]
    weights: Sequence[CodedWeight] = ()


def with_float_weights(model: onnx.ModelProto, weights: Iterable[CodedWeight]) -> onnx.ModelProto:
    """The same network with every ``BitShift -> Cast -> Mul -> Add`` replaced by its float32 result.

    This is what an ordinary exporter would have written; converters that know no shift can take it.
    """
    changed = copy.deepcopy(model)
    graph = changed.graph
    named = {weight.name: weight for weight in weights}
    parts = {f"{name}.{part}" for name in named for part in ("codes", "shift", "scale", "offset")}
    # A weight used twice has two chains: an Add inherits the name of the codes that its chain starts from.
    origin: dict[str, str] = {}
    rename: dict[str, str] = {}
    kept = []
    for node in graph.node:
        start = next((origin[value] for value in node.input if value in origin), None)
        if node.op_type == "BitShift":
            origin[node.output[0]] = node.input[0].removesuffix(".codes")
        elif start is not None and node.op_type in ("Cast", "Mul"):
            origin[node.output[0]] = start
        elif start is not None and node.op_type == "Add":
            rename[node.output[0]] = start
        else:
            node.input[:] = [rename.get(value, value) for value in node.input]
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name not in parts]
    initializers += [
        numpy_helper.from_array(weight.dequantized().astype(np.float32), name) for name, weight in named.items()
    ]
    del graph.value_info[:]
    rebuild(graph, kept, initializers)
    return changed


def without_batch_norms(model: onnx.ModelProto) -> FloatGraph:
    """The same float32 network with each BatchNormalization in the layer before it, or as Mul and Add.

    onnx2tf tries every axis order of every BatchNormalization, which takes most of its time. One whose statistics are
    computed, as where weights are standardised, stays as it is.

    Args:
        model: A network with float32 weights; it is not changed.
    """
    changed = copy.deepcopy(model)
    graph = changed.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    ranks: dict[str, int] = {}
    added: dict[str, npt.NDArray[np.float32]] = {}
    folded: dict[str, Folded] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not values.keys() >= {*node.input[1:5]}:
            kept.append(node)
            continue
        source, output = node.input[0], node.output[0]
        gain, shift = _gain_and_shift(node, values)
        before = producers.get(source)
        axis = _output_axis(before) if before else None
        if before and axis is not None and before.input[1] in values and readers[source] == 1:
            weight = values[before.input[1]]
            bias = values[before.input[2]] if len(before.input) > 2 else np.zeros(len(gain), np.float32)
            per_channel = gain.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
            added[f"{output}/weight"] = (weight * per_channel).astype(np.float32)
            folded[f"{output}/weight"] = Folded(before.input[1], gain)
            added[f"{output}/bias"] = (bias * gain + shift).astype(np.float32)
            before.input[1:] = [f"{output}/weight", f"{output}/bias"]
            before.output[0] = output
        else:
            ranks = ranks or _ranks(model)
            shape = (1, -1, *[1] * (ranks[source] - 2))
            added[f"{output}/gain"] = gain.reshape(shape).astype(np.float32)
            added[f"{output}/shift"] = shift.reshape(shape).astype(np.float32)
            scaled = f"{output}/scaled"
            kept.append(onnx.helper.make_node("Mul", [source, f"{output}/gain"], [scaled], f"{output}/Mul"))
            kept.append(onnx.helper.make_node("Add", [scaled, f"{output}/shift"], [output], f"{output}/Add"))
    used = {name for node in kept for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    initializers += [numpy_helper.from_array(value, name) for name, value in added.items()]
    rebuild(graph, kept, initializers)
    return FloatGraph(changed, folded)


def _output_axis(node: onnx.NodeProto) -> int | None:
    """The axis of a layer's weight that counts all output channels; None where there is none, or the bias is scaled."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Gemm":
        unscaled = all(attributes[name].f == 1 for name in ("alpha", "beta") if name in attributes)
        return 0 if unscaled and "transB" in attributes and attributes["transB"].i == 1 else None
    grouped = "group" in attributes and attributes["group"].i != 1
    return {"Conv": 0, "ConvTranspose": None if grouped else 1}.get(node.op_type)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Number of dimensions of every value."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)}


def for_batch(float_graph: FloatGraph, batch: int, sizes: Mapping[str, int]) -> FloatGraph:
    """The same network for so many samples, with everything computed in advance that depends on sizes alone.

    onnx2tf gets slices wrong where the batch is free, cannot compute shapes, and has no CastLike.
    """
    known = {**sizes, "batch": batch}
    changed = copy.deepcopy(float_graph.model)
    for value in (*changed.graph.input, *changed.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = "batch" if axis == 0 else dim.dim_param
            if name in known:
                dim.dim_value = known[name]
            elif name:  # a size computed from others, which follows from theirs
                dim.ClearField("dim_param")
    while left := _computed_from_sizes(changed):
        changed = _folded(changed)
        if _computed_from_sizes(changed) >= left:
            break
    return FloatGraph(_with_outputs_inferred(changed), float_graph.folded)


def with_weights_in_shape(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with initializers as they are where it gives them another shape and then their own again.

    Code that calls a layer's function itself does so, as Mamba with its convolution.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    starts: dict[str, str] = {}
    for node in model.graph.node:
        source = node.input[0] if node.input else ""
        if node.op_type in ("Identity", "Reshape", "Squeeze", "Unsqueeze") and (source in starts or source in shapes):
            starts[node.output[0]] = starts.get(source, source)
    if not starts:
        return model
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    own = {
        value.name: starts[value.name]
        for value in inferred
        if value.name in starts
        and tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) == shapes[starts[value.name]]
    }
    changed = copy.deepcopy(model)
    for node in changed.graph.node:
        node.input[:] = [own.get(name, name) for name in node.input]
    nodes = read_by_something(changed.graph.node, [value.name for value in changed.graph.output])
    rebuild(changed.graph, nodes, [*changed.graph.initializer])
    return changed


def _computed_from_sizes(model: onnx.ModelProto) -> int:
    """How many operators there are that give what is known once sizes are."""
    return sum(node.op_type in ("Shape", "CastLike") for node in model.graph.node)


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with what depends on known sizes alone as constants; that may make other sizes known."""
    import onnx_ir as ir
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import fold_constants

    before = {tensor.name for tensor in model.graph.initializer}
    of_the_network = {name for name in before if not name.startswith(CONSTANT_PREFIX)}
    without_shapes = copy.deepcopy(model)  # those of an earlier pass would stay, also where more is known now
    del without_shapes.graph.value_info[:]
    graph_model = ir.from_proto(onnx.shape_inference.infer_shapes(without_shapes, data_prop=True))

    def is_left(node: ir.Node) -> bool:
        # What depends on the network would differ from width to width; ONNX cannot evaluate GatherElements of one row.
        of_it = any(value is not None and value.name in of_the_network for value in node.inputs)
        return of_it or node.op_type == "GatherElements"

    fold_constants(graph_model, should_fold=lambda node: False if is_left(node) else None)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph_model)
    passes.RemoveUnusedNodesPass()(graph_model)
    initializers = graph_model.graph.initializers
    for name in [name for name in initializers if name not in before]:
        initializer = initializers.pop(name)
        initializer.name = f"{CONSTANT_PREFIX}{name}"
        initializers.add(initializer)
    return ir.to_proto(graph_model)


def _with_outputs_inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give outputs the sizes that follow from those of the inputs, where they have none."""
    dims = [dim for value in model.graph.output for dim in value.type.tensor_type.shape.dim]
    if not all(dim.HasField("dim_value") for dim in dims):
        for value, known in zip(model.graph.output, onnx.shape_inference.infer_shapes(model).graph.output, strict=True):
            value.CopyFrom(known)
    return model


def _gain_and_shift(
    node: onnx.NodeProto, values: dict[str, npt.NDArray[np.float32]]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """A BatchNormalization as ``gain * x + shift``, both per channel."""
    weight, bias, mean, variance = (values[name].astype(np.float64) for name in node.input[1:5])
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    # As float32, so that whoever multiplies float32 weights by the stored gain gets the same float32 numbers.
    gain = (weight / np.sqrt(variance + epsilon)).astype(np.float32)
    return gain, bias - mean * gain
