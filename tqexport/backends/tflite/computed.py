"""What a float network makes of its parameters alone, the same for every sample, computed before the conversion.

Published networks look biases up by a table of distances, or repeat a token for each sample. onnx2tf converts some of
these operators wrongly or not at all where they work on constants; with their result in the file none of them is left.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from math import prod

import onnx
from onnx import helper, numpy_helper

from tqexport.backends.onnx.file import CONSTANT_PREFIX, rebuild
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.tflite.fingerprints import parameters

__all__ = ["with_constants_computed"]

_MOST_ELEMENTS = 1 << 16  # of a result that is larger than what it is made of


def with_constants_computed(model: onnx.ModelProto, kept: Collection[str]) -> onnx.ModelProto:
    """The same network with a constant for each value that depends on no sample.

    What depends on a parameter is a parameter by the name of the value, and all else is a constant of the operators.

    Args:
        model: A float network whose sizes are all known; it is not changed.
        kept: Names of the parameters that have codes, which are to be found again.
    """
    computed = list(_of_constants(model, kept))
    if not computed:
        return model
    names = [name for node, _ in computed for name in node.output]
    of_parameters = {name for node, of_parameter in computed if of_parameter for name in node.output}
    left = [node for node in model.graph.node if not {*names}.intersection(node.output)]
    ends = {name for node in left for name in node.input} | {value.name for value in model.graph.output}
    wanted = [name for name in names if name in ends]
    only = copy.deepcopy(model)
    del only.graph.input[:], only.graph.output[:], only.graph.value_info[:], only.graph.node[:]
    only.graph.node.extend(node for node, _ in computed)
    only.graph.output.extend(map(helper.make_empty_tensor_value_info, wanted))
    values = OnnxSession(only.SerializeToString(), optimized=False).run(())

    changed = copy.deepcopy(model)
    renamed = {name: name if name in of_parameters else f"{CONSTANT_PREFIX}{name}" for name in wanted}
    nodes = []
    for node in changed.graph.node:
        if not {*names}.intersection(node.output):
            node.input[:] = [renamed.get(name, name) for name in node.input]
            nodes.append(node)
    used = {name for node in nodes for name in node.input} | {value.name for value in changed.graph.output}
    initializers = [tensor for tensor in changed.graph.initializer if tensor.name in used]
    initializers += [numpy_helper.from_array(value, renamed[name]) for name, value in zip(wanted, values, strict=True)]
    del changed.graph.value_info[:]
    rebuild(changed.graph, nodes, initializers)
    return changed


def _of_constants(model: onnx.ModelProto, kept: Collection[str]) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """The operators that depend on no sample, and whether on a parameter.

    Those that turn a weight are not among them: converters take these as they are.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    sizes = {
        value.name: prod(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in inferred.value_info
    }
    weights = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    sizes.update({tensor.name: prod(tensor.dims) for tensor in model.graph.initializer})
    constants = {tensor.name for tensor in model.graph.initializer} - {*kept}
    own = {*parameters(model)}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        given = [name for name in node.input if name]
        if not constants.issuperset(given) or outputs.intersection(node.output) or not given:
            continue
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            continue  # a branch may read whatever there is
        if node.op_type == "Transpose" and node.output[0] in weights:
            continue
        largest = max(sizes.get(name, 0) for name in given)
        of_parameter = not own.isdisjoint(given)
        if not (of_parameter and node.op_type == "Expand"):  # which would be as large as the batch
            largest = max(largest, _MOST_ELEMENTS)
        if all(0 < sizes.get(name, 0) <= largest for name in node.output):
            constants.update(node.output)
            own.update(node.output if of_parameter else ())
            yield node, of_parameter
