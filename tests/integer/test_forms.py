"""Every runtime computes what the integer model says, to the last bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
from integer_runs import (
    TFLITE_ROUNDINGS,
    differing_operations,
    levels_of_onnx,
    onnx_session,
    optimised_operators,
    run_tflite_levels,
    tflite_interpreter,
)

from tqexport import TruncModel
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.integer_runtime_file import runtime_integer_onnx
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.errors import ConversionError, InputError
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.grids import grids_of
from tqexport.integer.names import FLOAT_IO, FOLDED, INTEGER, SYMMETRIC
from tqexport.integer.naming import INPUT
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import store

EVERY_WIDTH = range(1, 9)
FUSED = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}
FLOAT = {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "ReduceMean", "Mul", "Relu"}


@pytest.mark.parametrize("kernel", [INTEGER, FOLDED])
@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_onnxruntime_equals_the_integer_model(calibrated, held_out, bits, kernel):
    network = integer_model(calibrated, bits)
    content = integer_onnx(calibrated, bits, kernel)
    (found,) = onnx_session(content).run(None, {INPUT: held_out})
    assert np.array_equal(found, network.to_floats(network.output, network.run(held_out)[network.output]))


def symmetric_to_int8(content):
    """Types and values of the zero points in a file."""
    zero_points = [t for t in onnx.load_from_string(content).graph.initializer if t.name.endswith(":zero_point")]
    return {(tensor.data_type, tensor.raw_data) for tensor in zero_points}


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_the_symmetric_form_is_the_integer_model(symmetric, held_out, tmp_path, bits):
    network = integer_model(symmetric, bits)
    content = integer_onnx(symmetric, bits, SYMMETRIC)
    assert symmetric_to_int8(content) == {(onnx.TensorProto.INT8, b"\0")}
    (found,) = OnnxSession(content).run((held_out,))
    assert np.array_equal(found, network.to_floats(network.output, network.run(held_out)[network.output]))
    operators = optimised_operators(content, tmp_path, int8=True)
    assert set(operators) >= FUSED
    assert not FLOAT & set(operators)


def test_the_symmetric_form_holds_what_tensorrt_documents_alone(symmetric):
    """Its table of operators: no BitShift, int8 alone de-quantised, zero points of 0."""
    graph = onnx.load_from_string(integer_onnx(symmetric, 4, SYMMETRIC)).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {node.op_type for node in graph.node} == {
        "Add", "Clip", "Conv", "DequantizeLinear", "Gemm", "GlobalAveragePool", "Identity", "QuantizeLinear", "Reshape",
    }  # fmt: skip
    read = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert {types.get(name, onnx.TensorProto.INT8) for name in read} == {onnx.TensorProto.INT8}


def test_eight_bits_are_symmetric_where_activations_are_narrow(held_out, digits):
    narrow = TruncModel(digits.module, replace(digits.info, widths=(4, 8), activation_bits=(4, 4)))
    model = calibrate(narrow, held_out[:100], symmetric=True)
    network = integer_model(model, 8)
    (found,) = OnnxSession(integer_onnx(model, 8, SYMMETRIC)).run((held_out,))
    assert np.array_equal(found, network.to_floats(network.output, network.run(held_out)[network.output]))


@pytest.mark.parametrize("zero_point", [0, 127, 129, 200])
def test_grids_that_int8_without_a_zero_point_does_not_hold_are_refused(symmetric, zero_point):
    model = TruncModel(copy.deepcopy(symmetric.module), symmetric.info)
    grids = grids_of(model.module)
    grids.zero_point[grids.widths.index(4), grids.names.index("mean")] = zero_point
    with pytest.raises(InputError, match="mean has levels at 4 bits that int8 without a zero point does not hold"):
        integer_onnx(model, 4, SYMMETRIC)


def test_activations_of_eight_bits_are_no_symmetric_int8(symmetric):
    with pytest.raises(InputError, match=r"act has levels at 8 bits .* at most 7 bits"):
        integer_onnx(symmetric, 8, SYMMETRIC)


@pytest.mark.parametrize("finer", [1e-4, 1e12])
def test_a_mean_that_onnxruntime_does_not_run_is_refused_by_name(calibrated, finer):
    model = TruncModel(copy.deepcopy(calibrated.module), calibrated.info)
    grids = grids_of(model.module)
    grids.scale[grids.widths.index(4), grids.names.index("mean")] *= finer
    with pytest.raises(ConversionError, match=r"the grid of mean at 4 bits is .* beside that of layers.2.act1"):
        integer_onnx(model, 4)


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_every_layer_of_onnxruntime_equals_the_integer_model(calibrated, held_out, bits):
    network = integer_model(calibrated, bits)
    names = [operation.output for operation in network.operations]
    values = levels_of_onnx(integer_onnx(calibrated, bits), held_out, names)
    values[INPUT] = network.run(held_out)[INPUT]
    assert differing_operations(network, values, "real") == []


@pytest.mark.parametrize("bits", [2, 8])
def test_onnxruntime_computes_every_layer_in_integers(calibrated, tmp_path, bits):
    operators = optimised_operators(integer_onnx(calibrated, bits), tmp_path)
    assert set(operators) >= FUSED
    assert not FLOAT & set(operators)
    assert operators.count("QLinearConv") == 9


def test_the_file_holds_the_codes_of_the_checkpoint_and_the_shift(calibrated):
    model = onnx.load_from_string(integer_onnx(calibrated, 3))
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, weight in quantized_weights(calibrated.module).items():
        assert np.array_equal(values[f"{name}.codes"], store(weight.original, 3).codes.numpy())
        assert values[f"{name}.shift"] == 5
    assert sum(node.op_type == "BitShift" for node in model.graph.node) == len(quantized_weights(calibrated.module))


def test_a_folded_file_holds_int8_weights_and_no_shift(calibrated):
    model = onnx.load_from_string(integer_onnx(calibrated, 3, FOLDED))
    assert "BitShift" not in {node.op_type for node in model.graph.node}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert values["layers.0.conv0.weight.integers"].dtype == np.int8


@pytest.mark.parametrize("rounding", TFLITE_ROUNDINGS)
@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_tflite_equals_the_integer_model(calibrated, held_out, bits, rounding):
    network, samples = integer_model(calibrated, bits), held_out[:40]
    values = network.run(samples, rounding)
    found = run_tflite_levels(integer_tflite(calibrated, bits), values[INPUT], rounding)
    assert np.array_equal(found, values[network.output])


def test_tflite_takes_floats_where_asked_for(calibrated, held_out):
    network = integer_model(calibrated, 4)
    interpreter = tflite_interpreter(integer_tflite(calibrated, 4, FLOAT_IO))
    source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    assert source["dtype"] == result["dtype"] == np.float32
    interpreter.set_tensor(source["index"], np.moveaxis(held_out[:1], 1, -1))
    interpreter.invoke()
    values = network.run(held_out[:1], "xnnpack")
    assert np.array_equal(interpreter.get_tensor(result["index"]), network.to_floats("fc", values["fc"]))


def test_the_same_checkpoint_gives_the_same_bytes(calibrated):
    assert integer_onnx(calibrated, 4) == integer_onnx(calibrated, 4)
    assert integer_tflite(calibrated, 8) == integer_tflite(calibrated, 8)


def test_one_file_switches_between_the_widths(calibrated, held_out, tmp_path):
    content = runtime_integer_onnx(calibrated, range(1, 8))
    session = onnx_session(content)
    for bits in range(1, 8):
        network = integer_model(calibrated, bits)
        (found,) = session.run(None, {INPUT: held_out, "bits": np.array(bits, np.uint8)})
        assert np.array_equal(found, network.to_floats(network.output, network.run(held_out)[network.output]))
    operators = optimised_operators(content, tmp_path)
    assert operators.count("QLinearConv") == 9
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(operators)
    assert len(content) < 1.5 * len(integer_onnx(calibrated, 7))


def test_a_width_the_file_lacks_is_refused_in_the_run(calibrated, held_out):
    session = onnx_session(runtime_integer_onnx(calibrated, (2, 4)))
    with pytest.raises(Exception, match="bits must be one of 2, 4"):
        session.run(None, {INPUT: held_out, "bits": np.array(3, np.uint8)})


def test_eight_bits_are_a_file_of_their_own(calibrated):
    with pytest.raises(InputError, match="8 bits need nine-bit integers"):
        runtime_integer_onnx(calibrated, (4, 8))


def test_layers_that_saturate_without_vnni_are_named(calibrated):
    assert integer_model(calibrated, 7).beyond_int16() == ("conv", "fc")  # their inputs have 256 levels
    assert "layers.0.conv0" in integer_model(calibrated, 8).beyond_int16()
