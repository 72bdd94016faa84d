"""Files made so that they look like an export and are none: each computes something else, and none passes."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from damage import changed_onnx
from judging import Judge, Kind
from onnx import TensorProto, helper, numpy_helper

from tqexport.backends.graphs import match
from tqexport.backends.onnx.file import write_facts
from tqexport.backends.onnx.parameters import compare_parameters
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.parameters import _graph as graph_of
from tqexport.backends.tflite.parameters import compare_parameters as compare_tflite
from tqexport.errors import InputError
from tqexport.facts import ArtifactFacts
from tqexport.truncation import Scheme

INTEGERS = Kind("tflite", "integer")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(tmp_path_factory.mktemp("judge"), samples=2)


def refused_or_failed(judge: Judge, kind: Kind, bits: int, content: bytes) -> str:
    """Why a file does not pass; the first problem or the sentence that refuses it."""
    try:
        checked = judge.checked(kind, bits, content)
    except InputError as error:
        return str(error)
    assert not any(each.passed for each in checked)
    return checked[0].problems[0]


# TFLite


def made_by(flat, name):
    return next(op for op in flat.graph.operators if flat.name(int(op.outputs[0])) == name)


def constant(flat, like, value):
    """A new constant of the type and name of another."""
    tensor = copy.deepcopy(flat.tensor(like))
    flat.graph.tensors.append(tensor)
    flat.set_constant(len(flat.graph.tensors) - 1, value)
    return len(flat.graph.tensors) - 1


def with_another_output(flat):
    """Applications that run the signature get another value; the network is as it was."""
    (signature,) = flat.model.signatureDefs
    signature.outputs[0].tensorIndex = flat.find("mean")


def with_ends_for_each_other(flat):
    """The signature takes the output of the network and gives its input."""
    (signature,) = flat.model.signatureDefs
    (given,), (returned,) = signature.inputs, signature.outputs
    given.tensorIndex, returned.tensorIndex = returned.tensorIndex, given.tensorIndex


def with_two_makers(flat):
    """Runtimes run the wrong one; the right one comes last and would be looked at."""
    right = made_by(flat, "layers.2.act0")
    wrong, bias = copy.deepcopy(right), int(right.inputs[2])
    wrong.inputs = np.array([*right.inputs[:2], constant(flat, bias, flat.constant(bias) + np.int32(6))], np.int32)
    flat.graph.operators[flat.graph.operators.index(right)] = wrong
    flat.graph.operators.append(right)


def with_a_reader_in_front(flat):
    operators = flat.graph.operators
    operators.insert(0, operators.pop())


def with_a_rounded_sum(flat):
    """A bias is a sum of constants with a fused activation, which sums without one equal."""
    last = flat.graph.operators[-1]
    bias = int(last.inputs[2])
    value = flat.constant(bias)
    added = np.where(np.arange(len(value)) % 2, 6, -6).astype(np.int32)
    parts = [constant(flat, bias, part) for part in (value - added, added, np.zeros_like(value))]
    results = [constant(flat, bias, value) for _ in range(2)]
    for index in (*parts, *results):
        flat.tensor(index).quantization = None
    for index in results:
        flat.tensor(index).buffer = 0
    options = [schema.AddOptionsT() for _ in range(2)]
    options[0].fusedActivationFunction = schema.ActivationFunctionType.RELU
    first = flat.operator("ADD", [parts[1], parts[2]], results[0], options[0])
    flat.insert_before(last, [first, flat.operator("ADD", [parts[0], results[0]], results[1], options[1])])
    last.inputs = np.array([*last.inputs[:2], results[1]], np.int32)


TFLITE = {
    with_another_output: "signature of other inputs or outputs",
    with_ends_for_each_other: "signature of other inputs or outputs",
    with_two_makers: "computed twice",
    with_a_reader_in_front: "read before it is computed",
    with_a_rounded_sum: "the structure",
}


@pytest.mark.parametrize("change", TFLITE, ids=lambda change: change.__name__)
def test_tflite_files_that_look_right_do_not_pass(judge, change):
    flat = FlatModel(judge.right(INTEGERS, 4))
    change(flat)
    assert TFLITE[change] in refused_or_failed(judge, INTEGERS, 4, flat.pack())


def test_options_and_names_of_another_operator_are_not_its_own(judge):
    """A runtime looks at neither: ADD with options of MUL has no activation, and SUB that is called ADD subtracts."""
    fresh = judge.right(INTEGERS, 4)
    flat = FlatModel(fresh)
    addition = next(op for op in flat.graph.operators if flat.operator_name(op) == "ADD")
    addition.builtinOptions, old = schema.MulOptionsT(), addition.builtinOptions
    addition.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.RELU
    addition.builtinOptionsType = schema.BuiltinOptions.MulOptions
    assert not compare_tflite(flat.pack(), fresh, 4, switched=False).proved
    addition.builtinOptions, addition.builtinOptionsType = old, schema.BuiltinOptions.AddOptions
    assert compare_tflite(flat.pack(), fresh, 4, switched=False).proved
    subtraction = schema.OperatorCodeT(schema.BuiltinOperator.SUB, "ADD", 1, schema.BuiltinOperator.SUB)
    flat.model.operatorCodes.append(subtraction)
    addition.opcodeIndex = len(flat.model.operatorCodes) - 1
    assert not compare_tflite(flat.pack(), fresh, 4, switched=False).proved


def test_constants_of_every_type_are_compared():
    """Truth values too, of which the digits network has none."""

    def masked(mask):
        tensors = [
            schema.TensorT(np.array([1, 4], np.int32), kind, name=name)
            for name, kind in zip("xmy", (schema.TensorType.FLOAT32, schema.TensorType.BOOL, 0), strict=True)
        ]
        tensors[1].buffer = 1
        operator = schema.OperatorT(0, np.array([1, 0, 0], np.int32), np.array([2], np.int32))
        graph = schema.SubGraphT(tensors, np.array([0], np.int32), np.array([2], np.int32), [operator])
        codes = [schema.OperatorCodeT(123, None, 1, schema.BuiltinOperator.SELECT_V2)]
        buffers = [schema.BufferT(), schema.BufferT(np.array(mask, np.uint8))]
        model = schema.ModelT(3, codes, [graph], "masked", buffers)
        return graph_of(FlatModel.of(model))

    assert match(masked([1, 0, 1, 0]), masked([1, 0, 1, 0]), 0.0).differences == {}
    assert match(masked([1, 0, 1, 0]), masked([1, 0, 0, 0]), 0.0).differences


# ONNX


def model_of(nodes, constants=(), opset=20, sizes=(1, 2, 8, 8)):
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    write_facts(model, ArtifactFacts(4, 4, 4, Scheme(), "network", "0" * 64, "channels first"))
    return model.SerializeToString()


def proved(content, fresh):
    return compare_parameters(content, fresh, 4).proved


def pool(size, kind="MaxPool"):
    return model_of([helper.make_node(kind, ["x"], ["y"], kernel_shape=[size, size], strides=[2, 2], pads=[1] * 4)])


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
def test_the_window_of_a_pool_is_no_default(kind):
    fresh = pool(3, kind)
    renamed = onnx.load_from_string(fresh)
    renamed.graph.node[0].name = "another"
    assert proved(renamed.SerializeToString(), fresh)
    assert not proved(pool(4, kind), fresh)


def test_operators_of_an_old_version_are_others_of_the_same_name():
    """Softmax of version 11 is over all axes from 1 on, and of 13 over the last."""
    nodes = [helper.make_node("Softmax", ["x"], ["y"])]
    assert proved(model_of(nodes, opset=21), model_of(nodes))
    assert not proved(model_of(nodes, opset=11), model_of(nodes))


def test_the_domain_of_onnx_has_two_names():
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)]
    other = onnx.load_from_string(model_of(nodes))
    other.opset_import[0].domain = "ai.onnx"
    assert proved(other.SerializeToString(), model_of(nodes))


def test_a_constant_that_is_not_a_number_equals_itself():
    def added(value, opset=20):
        constants = [("c", np.array([value, 1], np.float32))]
        return model_of([helper.make_node("Add", ["x", "c"], ["y"])], constants, opset)

    assert proved(added(np.nan, opset=21), added(np.nan))
    assert not proved(added(1, opset=21), added(np.nan))


def test_biases_that_float32_does_not_hold_are_not_compared_as_floats():
    def layer(bias, reshaped=False):
        constants = [
            ("one", np.float32(1)),
            ("ones", np.ones(2, np.float32)),
            ("zero", np.uint8(0)),
            ("zeros", np.zeros(2, np.int8)),
            ("weight", np.ones((2, 2, 1, 1), np.int8)),
            ("bias", np.array([[bias, 1]] if reshaped else [bias, 1], np.int32)),
            ("shape", np.array([2], np.int64)),
        ]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["levels"]),
            helper.make_node("DequantizeLinear", ["levels", "one", "zero"], ["value"]),
            helper.make_node("DequantizeLinear", ["weight", "ones", "zeros"], ["filter"], axis=0),
            *([helper.make_node("Reshape", ["bias", "shape"], ["flat"])] if reshaped else []),
            helper.make_node("DequantizeLinear", ["flat" if reshaped else "bias", "ones"], ["added"], axis=0),
            helper.make_node("Conv", ["value", "filter", "added"], ["y"]),
        ]
        return model_of(nodes, constants)

    base = (1 << 24) + 4
    assert proved(layer(base, reshaped=True), layer(base))
    assert not proved(layer(base + 1, reshaped=True), layer(base))


def test_a_kernel_that_the_checkpoint_has_no_files_of_does_not_excuse_from_the_comparison(judge):
    kind = Kind("onnx", "integer")
    content = changed_onnx(judge.right(kind, 4), "fc.bias_integers", lambda value: value + np.int32(1))
    for kernel, bits in (("integer-symmetric", 4), ("integer-packed", 6)):
        found = judge.fresh(kind).compare("onnx", kernel, content, bits, switched=False)
        assert "the kernel" in found.differences
