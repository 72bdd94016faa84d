"""Operators that are written out compute what the operator computes; what cannot be written out stays as it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tqexport.backends.tflite.lowered import lowered

SHAPE = (1, 3, 5, 6)
CONSTANTS = {
    "pads": [0, 0, 1, 2, 0, 0, 3, 0],
    "last": [-1],
    "front": [-(2**63)],
    "three": [3],
    "minus two": [-2],
    "axis": [3],
    "scalar": 3,
    "first": [-3],
    "sizes": [1, 3, 7, 9],
    "smaller": [1, 3, 4, 4],
}


def cases():
    yield "circular padding", "Pad", ["x", "pads"], {"mode": "wrap"}
    yield "flip", "Slice", ["x", "last", "front", "axis", "last"], {}
    yield "backwards in twos", "Slice", ["x", "last", "front", "first", "minus two"], {}
    yield "running sum", "CumSum", ["x", "scalar"], {}
    for sizes in ("sizes", "smaller"):
        for mode in ("nearest", "linear", "cubic"):
            corners = {"mode": mode, "coordinate_transformation_mode": "align_corners"}
            yield f"{mode} between corners, {sizes}", "Resize", ["x", "", "", sizes], corners
        uneven = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        yield f"nearest, {sizes}", "Resize", ["x", "", "", sizes], {"mode": "nearest", **uneven}
        yield f"cubic, {sizes}", "Resize", ["x", "", "", sizes], {"mode": "cubic", "cubic_coeff_a": -0.75}
    for equation in ("nchw,ncdw->nchd", "nchw,ncwd->nchd", "nchw,ncdh->ndcw"):
        yield equation, "Einsum", ["x", "y"], {"equation": equation}


def model_of(operator, inputs, attributes):
    node = helper.make_node(operator, inputs, ["z"], "the node", **attributes)
    given = {"x": SHAPE, "y": SHAPE}
    if attributes.get("equation", "").startswith("nchw,ncwd"):
        given["y"] = (1, 3, 6, 4)
    elif "ncdh" in attributes.get("equation", ""):
        given["y"] = (1, 3, 2, 5)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, given[name]) for name in inputs if name in given],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.array(CONSTANTS[name], np.int64), name)
            for name in dict.fromkeys(inputs)
            if name in CONSTANTS
        ],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    )


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"), [case[1:] for case in cases()], ids=[c[0] for c in cases()]
)
def test_what_is_written_out_computes_the_same(operator, inputs, attributes):
    model = model_of(operator, inputs, attributes)
    changed = lowered(model)
    assert operator not in {node.op_type for node in changed.graph.node} - ({"Slice"} if operator == "Pad" else set())
    onnx.checker.check_model(changed)
    generator = np.random.default_rng(0)
    fed = {
        value.name: generator.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype("f")
        for value in model.graph.input
    }
    (expected,), (result,) = (ReferenceEvaluator(one).run(None, fed) for one in (model, changed))
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("Pad", ["x", "pads"], {"mode": "reflect"}),
        ("CumSum", ["x", "scalar"], {"reverse": 1}),
        ("Resize", ["x", "", "", "sizes"], {"mode": "linear"}),  # onnx2tf carries it over
        ("Einsum", ["x", "y"], {"equation": "nchw,nchw->nchw"}),
        ("Slice", ["x", "last", "front", "axis"], {}),
    ],
)
def test_other_operators_stay_as_they_are(operator, inputs, attributes):
    model = model_of(operator, inputs, attributes)
    changed = lowered(model)
    assert [node.op_type for node in changed.graph.node] == [operator]
