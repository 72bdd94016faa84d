"""What depends on no sample is computed; weights with codes, and what would become large, stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tqexport.backends.tflite.computed import with_constants_computed

NETWORK = """
<ir_version: 10, opset_import: ["" : 19]>
graph (float[1, 3, 4] x) => (float[1, 5, 4] z)
<
    float[1, 1, 4] token = {1, 2, 3, 4}, float[3, 2] distances = {1, 2, 3, 4, 5, 6}, float[4] bias = {1, 2, 3, 4},
    float[4, 4] coded = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7},
    float[4, 4] weight = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6},
    int64[3] "constant/shape" = {1, 1, 4}, int64[3] "constant/more" = {2, 1, 4},
    int64[2, 2] "constant/rows" = {0, 2, 2, 1}, int64[1] "constant/axis" = {0},
    int64[1] "constant/two" = {2}, int64[1, 2] "constant/first" = {0, 1}, int64[2] "constant/large" = {70000, 4},
    int64[1, 1] "constant/last" = {-1}, int64[1] "constant/five" = {5}, int64[1] "constant/one" = {1}
>
{
    repeated = Expand(token, "constant/shape")
    twice = Add("constant/rows", "constant/rows")
    of_distances = Gather(distances, "constant/rows")
    turned = Transpose<perm = [2, 0, 1]>(of_distances)
    two = Unsqueeze(turned, "constant/axis")
    flat = ReduceSum<keepdims = 0>(two)
    for_each = Expand(token, "constant/more")
    of_all = ReduceSum<keepdims = 1>(for_each)
    kept_rows = Gather(coded, "constant/first")
    of_linear = Transpose(weight)
    product = MatMul(x, of_linear)
    wide = Expand(bias, "constant/large")
    narrow = Slice(wide, "constant/axis", "constant/two", "constant/axis")
    one = Gather(narrow, "constant/last")
    joined = Concat<axis = 1>(repeated, product, kept_rows)
    scaled = Mul(joined, flat)
    all = Mul(scaled, of_all)
    small = Gather(all, "constant/axis")
    shifted = Add(small, one)
    z = Slice(shifted, "constant/axis", "constant/five", "constant/one")
}
"""


def test_the_result_is_the_same_and_what_is_left_is_of_samples_of_codes_or_large():
    model = onnx.parser.parse_model(NETWORK)
    changed = with_constants_computed(model, {"coded"})
    onnx.checker.check_model(changed, full_check=True)
    left = [node.op_type for node in changed.graph.node]
    assert left == [
        *("Expand", "ReduceSum", "Gather", "Transpose", "MatMul", "Expand", "Slice", "Gather"),
        *("Concat", "Mul", "Mul", "Gather", "Add", "Slice"),
    ]
    x = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
    (expected,), (result,) = (ReferenceEvaluator(one).run(None, {"x": x}) for one in (model, changed))
    assert np.allclose(result, expected, rtol=1e-6)


def test_what_depends_on_a_parameter_is_one_and_all_else_is_a_constant_of_the_operators():
    model = onnx.parser.parse_model(NETWORK)
    del model.graph.node[:]
    model.graph.node.extend(onnx.parser.parse_model(NETWORK).graph.node[:2])
    model.graph.node.extend([onnx.helper.make_node("Concat", ["repeated", "x"], ["y"], axis=1)])
    model.graph.node.extend([onnx.helper.make_node("Gather", ["y", "twice"], ["z"], axis=1)])
    values = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in with_constants_computed(model, ()).graph.initializer
    }
    assert {*values} == {"repeated", "constant/twice"}
    assert values["constant/twice"].tolist() == [[0, 4], [4, 2]]
    assert values["repeated"].shape == (1, 1, 4)


def test_a_network_without_any_is_the_same_one():
    model = onnx.parser.parse_model(NETWORK)
    del model.graph.node[:]
    model.graph.node.extend([onnx.helper.make_node("MatMul", ["x", "weight"], ["z"])])
    assert with_constants_computed(model, ()) is model
