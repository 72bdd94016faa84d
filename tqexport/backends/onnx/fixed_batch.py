"""A captured network that takes a fixed number of samples at once: shapes are numbers, and nothing computes them.

Compilers for accelerators want that. The network is captured with a free batch all the same, so that samples do not
get at each other, and names are those of other files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common as passes

from tqexport.backends.onnx.file import BATCH

__all__ = ["fix_batch"]


def fix_batch(
    template: ir.Model,
    batch: int,
    fold: Callable[[ir.Model], object],
    constant: Callable[[ir.Graph, str, npt.NDArray[np.int64]], ir.Value],
) -> Mapping[str, int]:
    """Fix how many samples a captured network takes at once, in place.

    Args:
        template: The graph, with shapes that name the batch.
        batch: How many.
        fold: Folds what depends on no tensor of the network.
        constant: Makes a constant in a graph, from what it is and its numbers.

    Returns:
        By name, of values that have the samples behind other axes, how many steps these are; see
        :class:`tqexport.facts.ArtifactFacts`.
    """
    inner = [value for node in template.graph for value in node.outputs]
    steps = {str(value.name): count for value in inner if (count := _steps_in_front(value)) > 1}
    ends = (*template.graph.inputs, *template.graph.outputs)
    for value in inner:
        value.shape = None
    for value in ends:
        if value.shape is not None:
            value.shape = ir.Shape([batch if _is_batch(dim) else dim for dim in value.shape])
    passes.ShapeInferencePass()(template)
    for node in template.graph:
        shape, target = node.outputs[0].shape, node.inputs[1] if node.op_type == "Reshape" else None
        computed = target is not None and ir.convenience.get_const_tensor(target) is None
        if computed and shape is not None and all(isinstance(dim, int) for dim in shape):
            node.replace_input_with(1, constant(template.graph, "shape", np.array([*shape], np.int64)))
    fold(template)
    return steps


def _is_batch(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value == BATCH


def _steps_in_front(value: ir.Value) -> int:
    """How many numbers of the first axes there are before the axis of the samples."""
    dims = [] if value.shape is None else [*value.shape]
    axis = next((axis for axis, dim in enumerate(dims) if _is_batch(dim)), 0)
    before = dims[:axis]
    return prod(int(dim) for dim in before) if all(isinstance(dim, int) for dim in before) else 1
