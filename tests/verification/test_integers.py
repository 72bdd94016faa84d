"""verify of integer files: right ones pass in every runtime, and whatever is changed in one place is found."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx
import pytest
from damage import changed_onnx
from integer_runs import integer_verdicts
from onnx import numpy_helper

from tqexport.backends import backend_of
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.integer_runtime_file import runtime_integer_onnx
from tqexport.backends.parameters import Parameters
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.errors import InputError
from tqexport.integer.build import integer_model
from tqexport.integer.grids import grids_of
from tqexport.integer.names import FLOAT_IO, FOLDED, SYMMETRIC
from tqexport.verification.fresh import FreshExports
from tqexport.verification.integers import IntegerComparison
from tqexport.verification.trial import project_of

SAMPLES = 24


@pytest.mark.parametrize("bits", range(1, 9))
def test_right_files_pass_in_every_runtime(calibrated, held_out, bits):
    for content in (integer_onnx(calibrated, bits), integer_tflite(calibrated, bits)):
        for name, verdict in integer_verdicts(calibrated, bits, content, held_out[:SAMPLES]).items():
            assert verdict.passed, (name, verdict.problems)
            assert verdict.codes == 76_288
            assert verdict.codes_wrong == verdict.activations_wrong == 0
            assert verdict.activations > SAMPLES * 5_000
            assert verdict.flips < 0.02 * verdict.activations
            assert verdict.flip_bound < 0.3
            assert verdict.top1_agreement == 1


@pytest.mark.parametrize("bits", [3, 8])
def test_the_other_forms_pass_too_and_fail_when_changed(calibrated, held_out, bits):
    for content, kernel, name in (
        (integer_onnx(calibrated, bits, FOLDED), FOLDED, "layers.1.conv1.bias_integers"),
        (integer_tflite(calibrated, bits, FLOAT_IO), FLOAT_IO, "layers.1.conv1.bias"),
    ):
        for verdict in integer_verdicts(calibrated, bits, content, held_out[:SAMPLES], kernel).values():
            assert verdict.passed, verdict.problems
            assert verdict.top1_agreement == 1
        change = changed_onnx if name.endswith("integers") else changed_tflite
        found = integer_verdicts(calibrated, bits, change(content, name, one_more), held_out[:2], kernel)
        assert not any(verdict.passed for verdict in found.values())


SYMMETRIC_DAMAGE = {
    "a weight": ("layers.1.conv1.weight.integers", lambda value: np.where(value == value.max(), value - 1, value)),
    "a bias by one unit": ("layers.1.conv1.bias", lambda value: value * np.float32(1.001)),
    "a scale": ("layers.1.bn1:scale", lambda value: value * np.float32(1.01)),
    "a zero point": ("layers.1.bn1:zero_point", lambda value: value + np.int8(1)),
    "the levels of an activation": ("layers.1.act1:high", lambda value: value - np.int8(1)),
}


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_the_symmetric_form_passes_and_fails_when_changed(symmetric, held_out, bits):
    content = integer_onnx(symmetric, bits, SYMMETRIC)
    (verdict,) = integer_verdicts(symmetric, bits, content, held_out[:SAMPLES], SYMMETRIC).values()
    assert verdict.passed, verdict.problems
    assert verdict.activations > SAMPLES * 5_000
    for name, change in SYMMETRIC_DAMAGE.values():
        (verdict,) = integer_verdicts(
            symmetric, bits, changed_onnx(content, name, change), held_out[:2], SYMMETRIC
        ).values()
        assert not verdict.passed
        assert verdict.problems[0].startswith("layers.1."), verdict.problems


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_one_file_for_all_widths_passes_at_each(calibrated, held_out, bits):
    content = runtime_integer_onnx(calibrated, range(1, 8))
    (verdict,) = integer_verdicts(calibrated, bits, content, held_out[:SAMPLES], switched=True).values()
    assert verdict.passed, verdict.problems
    (other,) = integer_verdicts(calibrated, 2, content, held_out[:SAMPLES], switched=True).values()
    assert other.passed


def one_more(value):
    value.reshape(-1)[3] += 1
    return value


def one_bit(value):
    value.reshape(-1)[17] ^= 0x80
    return value


ONNX_DAMAGE = {
    "a code": ("layers.1.conv1.weight.codes", one_bit, "layers.1.conv1.weight."),
    "the shift": ("layers.1.conv1.weight.shift", lambda value: value + np.uint8(1), "layers.1.conv1.weight."),
    "a weight of a float layer": ("fc.weight.unsigned", one_more, "fc.weight.unsigned: "),
    "a bias by one unit": ("layers.1.conv1.bias_integers", one_more, "layers.1.conv1.bias_integers: "),
    "a scale": ("layers.2.conv0.scale", lambda value: value * np.float32(1.01), "layers.2.conv0.scale: "),
    "the grid of a sum's term": ("layers.1.bn1:scale", lambda value: value * np.float32(1.01), "layers.1"),
    "a zero point": ("layers.1.bn1:zero_point", lambda value: value + np.uint8(1), "layers.1"),
    "the levels of an activation": ("layers.0.act1:high", lambda value: value - np.uint8(1), "layers.0.act1:high: "),
}


@pytest.mark.parametrize("case", ONNX_DAMAGE)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_changed_in_an_onnx_file_is_found_and_named(calibrated, held_out, case, bits):
    name, change, words = ONNX_DAMAGE[case]
    content = changed_onnx(integer_onnx(calibrated, bits), name, change)
    (verdict,) = integer_verdicts(calibrated, bits, content, held_out).values()
    assert not verdict.passed
    assert verdict.problems[0].startswith(words), verdict.problems
    assert verdict.diverged


def changed_tflite(content, name, change):
    flat = FlatModel(content)
    index = flat.find(name)
    flat.set_constant(index, np.ascontiguousarray(change(flat.constant(index).copy())))
    return flat.pack()


def rescaled(content, name):
    flat = FlatModel(content)
    quantization = flat.tensor(flat.find(name)).quantization
    quantization.scale = np.asarray(quantization.scale) * np.float32(1.01)
    return flat.pack()


TFLITE_DAMAGE = {
    "a weight": lambda content: changed_tflite(content, "layers.1.conv1.weight", lambda value: -value),
    "a bias": lambda content: changed_tflite(content, "layers.1.conv1.bias", lambda value: value + 40),
    "a filter's scale": lambda content: rescaled(content, "layers.1.conv1.weight"),
    "a grid": lambda content: rescaled(content, "layers.1.bn1"),
}


@pytest.mark.parametrize("case", TFLITE_DAMAGE)
@pytest.mark.parametrize("bits", [2, 8])
def test_what_is_changed_in_a_tflite_file_is_found(calibrated, held_out, case, bits):
    content = TFLITE_DAMAGE[case](integer_tflite(calibrated, bits, batch=1 + bits))
    for name, verdict in integer_verdicts(calibrated, bits, content, held_out).items():
        assert not verdict.passed, name
        assert verdict.problems[0].startswith("layers.1.")


@pytest.mark.parametrize("what", ["scale", "zero_point"])
def test_a_reference_with_another_grid_is_told_from_the_file(calibrated, held_out, what):
    """The checkpoint changes and the file stays: the file is no longer right."""
    content = integer_onnx(calibrated, 4)
    grids = grids_of(calibrated.module)
    row, column = grids.widths.index(4), grids.names.index("layers.1.bn1")
    before = getattr(grids, what).clone()
    try:
        getattr(grids, what)[row, column] += 0.01 * before[row, column] if what == "scale" else 1
        fresh = FreshExports(project_of(calibrated), {})
        (verdict,) = integer_verdicts(calibrated, 4, content, held_out[:SAMPLES], fresh=fresh).values()
        assert not verdict.passed
    finally:
        getattr(grids, what).copy_(before)


def test_pytorch_is_the_judge_of_the_integer_model_too(calibrated, held_out):
    """A wrong integer model agrees with its own files; PyTorch does not agree with either."""
    right = integer_model(calibrated, 4)
    wrong = dataclasses.replace(
        right,
        operations=tuple(
            dataclasses.replace(operation, bias=operation.bias + 60)
            if operation.name == "layers.1.conv1"
            else operation
            for operation in right.operations
        ),
    )
    content = changed_onnx(
        integer_onnx(calibrated, 4), "layers.1.conv1.bias_integers", lambda value: value + np.int32(60)
    )
    (runtime,) = backend_of(content).open_integers(content, lambda _: wrong, wrong.bits, switched=False)
    comparison = IntegerComparison(calibrated, wrong, runtime, runtime, Parameters(content))
    comparison.add(held_out[:SAMPLES])
    verdict = comparison.verdict()
    assert not verdict.passed
    assert "differ from PyTorch" in verdict.problems[0]
    assert verdict.problems[0].startswith("layers.1.bn1")


def rewired_onnx(content, reader, place, name):
    """A node that reads a copy of a constant with one element changed; the constant itself stays as it was."""
    model = onnx.load_from_string(content)
    value = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()
    value.reshape(-1)[0] += 1 if value.dtype.kind in "iu" else 0.001 * value.reshape(-1)[0]
    model.graph.initializer.append(numpy_helper.from_array(value, "another"))
    next(node for node in model.graph.node if node.output[0] == reader).input[place] = "another"
    return model.SerializeToString()


REWIRED = {  # by what reads them, constants whose change few samples show
    "layers.1.conv0.weight.shifted": (0, "layers.1.conv0.weight.codes"),
    "layers.2.conv0.bias": (0, "layers.2.conv0.bias_integers"),
    "layers.2.conv0.weight": (1, "layers.2.conv0.scale"),
    "fc:value": (1, "fc:scale"),
}


@pytest.mark.parametrize("reader", REWIRED)
def test_a_node_that_reads_another_constant_is_found_whatever_the_samples_show(calibrated, held_out, reader):
    content = rewired_onnx(integer_onnx(calibrated, 4), reader, *REWIRED[reader])
    (verdict,) = integer_verdicts(calibrated, 4, content, held_out[:2]).values()
    assert not verdict.passed
    assert verdict.problems[0].startswith(REWIRED[reader][1])
    assert "where the checkpoint gives" in verdict.problems[0]


def test_what_stands_behind_the_last_node_is_found_in_an_onnx_file(calibrated, held_out):
    """Outputs that are off by less than half a level."""
    model = onnx.load_from_string(integer_onnx(calibrated, 4))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.001), "factor"))
    (last,) = (node for node in model.graph.node if node.output[0] == model.graph.output[0].name)
    last.op_type = "Mul"
    last.input.append("factor")
    (verdict,) = integer_verdicts(calibrated, 4, model.SerializeToString(), held_out[:2]).values()
    assert not verdict.passed


def twin_of(flat, index):
    """A second tensor of the same name and value."""
    flat.graph.tensors.append(copy.deepcopy(flat.tensor(index)))
    return len(flat.graph.tensors) - 1


def rewired_tflite(content, output, place, change):
    """An operator that reads a changed twin of a constant; the constant itself stays as it was."""
    flat = FlatModel(content)
    operator = next(op for op in flat.graph.operators if flat.name(int(op.outputs[0])) == output)
    twin = twin_of(flat, int(operator.inputs[place]))
    change(flat, twin)
    operator.inputs = np.array([twin if i == place else tensor for i, tensor in enumerate(operator.inputs)], np.int32)
    return flat.pack()


def _one_more(flat, tensor):
    flat.set_constant(tensor, one_more(flat.constant(tensor).copy()))


def _scaled(flat, tensor):
    quantization = flat.tensor(tensor).quantization
    quantization.scale = np.asarray(quantization.scale) * np.float32(1.01)


@pytest.mark.parametrize("change", [_one_more, _scaled])
@pytest.mark.parametrize(("place", "part"), [(1, "weight"), (2, "bias")])
def test_an_operator_that_reads_another_tensor_of_the_same_name_is_found(calibrated, held_out, place, part, change):
    content = rewired_tflite(integer_tflite(calibrated, 4), "layers.2.act0", place, change)
    for name, verdict in integer_verdicts(calibrated, 4, content, held_out[:2]).items():
        assert not verdict.passed, name
        assert verdict.problems[0].startswith(f"layers.2.conv0.{part}: ")


def test_options_of_an_operator_are_compared(calibrated, held_out):
    """A dilation of a 1x1 kernel changes nothing yet."""
    flat = FlatModel(integer_tflite(calibrated, 4))
    operator = next(op for op in flat.graph.operators if flat.name(int(op.outputs[0])) == "layers.1.shortcut.1")
    operator.builtinOptions.dilationWFactor = 2
    for name, verdict in integer_verdicts(calibrated, 4, flat.pack(), held_out[:2]).items():
        assert not verdict.passed, name


@pytest.mark.parametrize("attribute", ["strides", "pads", "dilations"])
def test_values_of_another_shape_are_named(calibrated, held_out, attribute):
    model = onnx.load_from_string(integer_onnx(calibrated, 4))
    (node,) = (node for node in model.graph.node if node.output[0] == "act:float")
    next(entry for entry in node.attribute if entry.name == attribute).ints[0] += 1
    (verdict,) = integer_verdicts(calibrated, 4, model.SerializeToString(), held_out[:2]).values()
    assert not verdict.passed
    assert "levels of shape" in verdict.problems[-1]


def test_values_of_another_shape_are_named_in_a_tflite_file(calibrated, held_out):
    flat = FlatModel(integer_tflite(calibrated, 4))
    operator = next(op for op in flat.graph.operators if flat.name(int(op.outputs[0])) == "layers.2.act0")
    operator.builtinOptions.strideW = 3
    for name, verdict in integer_verdicts(calibrated, 4, flat.pack(), held_out[:2]).items():
        assert not verdict.passed, name


def test_a_run_time_file_that_is_taken_for_a_fixed_one_is_refused(calibrated, held_out):
    content = runtime_integer_onnx(calibrated, (2, 4))
    with pytest.raises(InputError):
        integer_verdicts(calibrated, 2, content, held_out[:2])


@pytest.mark.parametrize(
    ("runtimes", "names"),
    [({"litert"}, ["LiteRT"]), ({"xnnpack"}, ["LiteRT XNNPACK"]), ({"onnxruntime", "xnnpack"}, ["LiteRT XNNPACK"])],
)
def test_only_the_runtimes_asked_for_are_opened(calibrated, runtimes, names):
    content, network = integer_tflite(calibrated, 4), integer_model(calibrated, 4)
    opened = backend_of(content).open_integers(
        content, lambda _: network, network.bits, switched=False, runtimes=runtimes
    )
    assert [runtime.name for runtime in opened] == names
    content = integer_onnx(calibrated, 4)
    opened = backend_of(content).open_integers(
        content, lambda _: network, network.bits, switched=False, runtimes=runtimes
    )
    assert [runtime.name for runtime in opened] == sorted(runtimes & {"onnxruntime"})
