"""Every runtime computes what the integer model says, to the last bit."""

from __future__ import annotations

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

from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.integer_runtime_file import runtime_integer_onnx
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.errors import InputError
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.naming import INPUT
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import store

EVERY_WIDTH = range(1, 9)
FUSED = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}
FLOAT = {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "ReduceMean", "Mul", "Relu"}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_onnxruntime_equals_the_integer_model(calibrated, held_out, bits, folded):
    network = integer_model(calibrated, bits)
    content = integer_onnx(calibrated, bits, folded=folded)
    (found,) = onnx_session(content).run(None, {INPUT: held_out})
    assert np.array_equal(found, network.to_floats(network.output, network.run(held_out)[network.output]))


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_symmetric_int8_is_the_integer_model(digits, held_out, bits):
    symmetric = calibrate(digits, held_out, symmetric=True)
    network = integer_model(symmetric, bits)
    content = integer_onnx(symmetric, bits, activations="int8")
    zero_points = [t for t in onnx.load_from_string(content).graph.initializer if t.name.endswith(":zero_point")]
    assert {(tensor.data_type, tensor.raw_data) for tensor in zero_points} == {(onnx.TensorProto.INT8, b"\0")}
    # onnxruntime's CPU computes this form in floats, so a product near a half may round the other way.
    names = [operation.output for operation in network.operations]
    values = {INPUT: network.run(held_out)[INPUT]}
    for name, levels in levels_of_onnx(content, held_out, names, np.int8).items():
        values[name] = (levels.astype(int) + network.grids[name].zero_point).astype(np.uint8)
    for operation in network.operations:
        distance = np.abs(network.compute(operation, values, "real").astype(int) - values[operation.output])
        assert distance.max() <= 1
        assert np.count_nonzero(distance) <= 1e-3 * distance.size


def test_grids_with_zero_points_are_no_symmetric_int8(calibrated):
    with pytest.raises(InputError, match="input has levels that int8 without a zero point does not hold"):
        integer_onnx(calibrated, 4, activations="int8")


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
    model = onnx.load_from_string(integer_onnx(calibrated, 3, folded=True))
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
    interpreter = tflite_interpreter(integer_tflite(calibrated, 4, float_io=True))
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
