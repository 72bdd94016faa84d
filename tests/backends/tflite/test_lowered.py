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
    "one": 1,
    "two": 2,
    "first": [-3],
    "sizes": [1, 3, 7, 9],
    "smaller": [1, 3, 4, 4],
    "axes": [1, 2],
    "picture": [4, 6],
    "larger picture": [5, 8],
    "block": [2, 3],
}
FLOATS = {
    "ones": np.ones(2, np.float32),
    "zeros": np.zeros(2, np.float32),
    "per place": np.linspace(-1, 2, 90, dtype=np.float32).reshape(SHAPE[1:]),
    "per row": np.linspace(-1, 2, 30, dtype=np.float32).reshape(SHAPE[2:]),
    "per channel": np.array([1, -2, 3], np.float32),
    "token": np.linspace(1, 2, 18, dtype=np.float32).reshape(1, 3, 1, 6),
    "two tokens": np.linspace(-2, -1, 36, dtype=np.float32).reshape(1, 3, 2, 6),
}


def cases():
    yield "circular padding", "Pad", ["x", "pads"], {"mode": "wrap"}
    yield "flip", "Slice", ["x", "last", "front", "axis", "last"], {}
    yield "backwards in twos", "Slice", ["x", "last", "front", "first", "minus two"], {}
    pool = {"kernel_shape": [3, 2], "strides": [1, 2], "count_include_pad": 1}
    yield "a mean that counts zeros", "AveragePool", ["x"], {**pool, "pads": [1, 0, 2, 1]}
    for axis in ("one", "two"):
        yield f"Fourier transform, {axis}", "DFT", ["complex", "", axis], {}
        yield f"Fourier transform back, {axis}", "DFT", ["complex", "", axis], {"inverse": 1}
    yield "Fourier transform of real numbers", "DFT", ["real", "", "two"], {"onesided": 1}
    blocks = {"strides": [2, 3]}
    yield "blocks side by side", "Col2Im", ["columns", "picture", "block"], blocks
    yield "blocks with a rest", "Col2Im", ["columns", "larger picture", "block"], blocks
    yield "running sum", "CumSum", ["x", "scalar"], {}
    for sizes in ("sizes", "smaller"):
        for mode in ("nearest", "linear", "cubic"):
            corners = {"mode": mode, "coordinate_transformation_mode": "align_corners"}
            yield f"{mode} between corners, {sizes}", "Resize", ["x", "", "", sizes], corners
        uneven = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        yield f"nearest, {sizes}", "Resize", ["x", "", "", sizes], {"mode": "nearest", **uneven}
        yield f"cubic, {sizes}", "Resize", ["x", "", "", sizes], {"mode": "cubic", "cubic_coeff_a": -0.75}
    yield "a constant in front", "Concat", ["token", "x"], {"axis": 2}
    yield "constants on all sides", "Concat", ["token", "x", "two tokens", "y", "token"], {"axis": -2}
    yield "two constants in a row", "Concat", ["x", "two tokens", "token"], {"axis": 2}
    yield "root of squares", "ReduceL2", ["x", "axes"], {}
    yield "root of squares without their axes", "ReduceL2", ["x", "axes"], {"keepdims": 0}
    yield "another axis", "Unsqueeze", ["x", "axes"], {}
    yield "layer norm", "LayerNormalization", ["x", "per place", "per place"], {"axis": 1}
    yield "layer norm over two axes", "LayerNormalization", ["x", "per row"], {"axis": -2, "epsilon": 0.1}


def model_of(operator, inputs, attributes):
    node = helper.make_node(operator, inputs, ["z"], "the node", **attributes)
    given = {"x": SHAPE, "y": SHAPE, "columns": (2, 3 * 6, 4), "complex": (2, 5, 6, 2), "real": (2, 5, 6, 1)}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, given[name]) for name in inputs if name in given],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(FLOATS[name] if name in FLOATS else np.array(CONSTANTS[name], np.int64), name)
            for name in dict.fromkeys(inputs)
            if name in CONSTANTS or name in FLOATS
        ],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"), [case[1:] for case in cases()], ids=[c[0] for c in cases()]
)
def test_what_is_written_out_computes_the_same(operator, inputs, attributes):
    model = model_of(operator, inputs, attributes)
    changed = lowered(model)
    written_as = {"Pad": {"Slice"}, "Concat": {"Concat"}, "AveragePool": {"AveragePool"}}
    assert operator not in {node.op_type for node in changed.graph.node} - written_as.get(operator, set())
    assert not any({*FLOATS}.intersection(node.input) for node in changed.graph.node if node.op_type == "Concat")
    assert_same(model, changed)


def assert_same(model, changed):
    onnx.checker.check_model(changed)
    generator = np.random.default_rng(0)
    fed = {
        value.name: generator.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype("f")
        for value in model.graph.input
    }
    (expected,), (result,) = (ReferenceEvaluator(one).run(None, fed) for one in (model, changed))
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 2e-6 * np.abs(expected).max()


ROWS = {
    "pixel unshuffle": (
        (1, 3, 2, 2, 3, 2),
        "z = Transpose<perm = [0, 1, 3, 5, 2, 4]>(x)",
        {},
        ["Transpose", "Transpose"],
    ),
    "a constant with fewer axes": (
        (1, 3, 4, 4),
        """
        higher = Max(x, square)
        scaled = Mul(channel, higher)
        z = Sub(scaled, row)
        """,
        {
            "square": np.eye(4, dtype="f"),
            "row": np.arange(4, dtype="f"),
            "channel": np.arange(3, dtype="f").reshape(3, 1, 1),
        },
        ["Max", "Mul", "Sub"],
    ),
}


@pytest.mark.parametrize(("shape", "body", "constants", "operators"), ROWS.values(), ids=ROWS)
def test_rows_of_operators_are_written_as_others(shape, body, constants, operators):
    head = f"<ir_version: 10, opset_import: ['' : 19]> g (float[{','.join(map(str, shape))}] x) => (float z)"
    model = onnx.parser.parse_model(f"{head.replace(chr(39), chr(34))} {{ {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    for name, values in constants.items():
        array = np.asarray(values, None if isinstance(values, np.ndarray) else np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model = onnx.shape_inference.infer_shapes(model)
    changed = lowered(model)
    assert [node.op_type for node in changed.graph.node] == operators
    assert_same(model, changed)
    if "Max" in operators:
        assert sorted(len(tensor.dims) for tensor in changed.graph.initializer) == [1, 4, 4]


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("Pad", ["x", "pads"], {"mode": "reflect"}),
        ("CumSum", ["x", "scalar"], {"reverse": 1}),
        ("Resize", ["x", "", "", "sizes"], {"mode": "linear"}),  # onnx2tf carries it over
        ("Slice", ["x", "last", "front", "axis"], {}),
        ("Col2Im", ["columns", "picture", "block"], {"strides": [1, 3]}),  # blocks that overlap; refused by name
        ("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1] * 4}),
        ("AveragePool", ["x"], {"kernel_shape": [3, 3], "count_include_pad": 1}),
    ],
)
def test_other_operators_stay_as_they_are(operator, inputs, attributes):
    model = model_of(operator, inputs, attributes)
    changed = lowered(model)
    assert [node.op_type for node in changed.graph.node] == [operator]
