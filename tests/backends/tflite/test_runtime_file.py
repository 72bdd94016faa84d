"""One TFLite file for every width: a signature each over one copy of the codes, and the fixed files back from it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter
from networks import FloatLayers, Layers, model_of, one_dimensional, randomize_
from places import artifact
from torch import nn

from tqexport import Scheme, prepare
from tqexport.artifacts.truncate import truncate_file
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.file import subgraph_of, unpack
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.errors import InputError, UsageError
from tqexport.runtime import SwitchableModel
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import direct_codes, normalize
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)


def fixed(exported_once, bits):
    return artifact(exported_once, "tflite", bits)


def buffers(content):
    return [bytes(b.data) if b.data is not None else b"" for b in unpack(content)[0].buffers]


def test_a_signature_per_width_over_one_copy_of_the_codes(digits, runtime_tflite):
    signatures = Interpreter(model_content=runtime_tflite).get_signature_list()
    assert signatures == {f"w{bits}": {"inputs": ["input"], "outputs": ["output"]} for bits in WIDTHS}
    stored = buffers(runtime_tflite)
    for weight in quantized_weights(digits.module).values():
        codes = direct_codes(normalize(weight.original.detach()), 8).byte().numpy()
        assert stored.count(codes.transpose(0, 2, 3, 1).tobytes()) == 1
    model = unpack(runtime_tflite)[0]
    used = [{t.buffer for t in graph.tensors if t.name.endswith(b".weight.codes")} for graph in model.subgraphs]
    assert len(used) == 8
    assert all(each == used[0] and len(each) == 8 for each in used)


def test_the_shift_is_in_the_file(runtime_tflite):
    model = unpack(runtime_tflite)[0]
    for bits in WIDTHS:
        flat = subgraph_of(model, bits)
        shifts = [operator for operator in flat.graph.operators if flat.operator_name(operator) == "RIGHT_SHIFT"]
        assert len(shifts) == 8
        for shift in shifts:
            codes, by = map(flat.constant, shift.inputs)
            assert codes.dtype == by.dtype == np.uint8
            assert by.tolist() == [8 - bits]


def test_eight_widths_take_a_quarter_of_eight_files(exported_once, runtime_tflite):
    assert len(runtime_tflite) < 0.25 * sum(len(fixed(exported_once, bits)) for bits in WIDTHS)
    assert sum(map(len, buffers(runtime_tflite))) < 76_288 + 4 * 11_000


def test_the_file_is_hardly_larger_than_its_codes_and_tables(runtime_tflite):
    model = unpack(runtime_tflite)[0]
    described = sum(len(model.buffers[entry.buffer].data) for entry in model.metadata)
    assert len(runtime_tflite) <= 1.03 * (sum(map(len, buffers(runtime_tflite))) - described) + 30_000


def test_buffers_lie_where_the_schema_wants_them(runtime_tflite):
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAsModel(runtime_tflite, 0)
    held = [model.Buffers(i) for i in range(model.BuffersLength()) if model.Buffers(i).DataLength()]
    assert all(buffer._tab.Vector(buffer._tab.Offset(4)) % 16 == 0 for buffer in held)


@pytest.mark.parametrize("bits", WIDTHS)
def test_parity_on_real_digits_at_every_width(digits, digits_samples, runtime_tflite, bits):
    inputs, labels = digits_samples.inputs[:100], digits_samples.labels[:100]
    found = compare(digits, bits, run_file(runtime_tflite, inputs, bits), inputs, labels)
    assert found.passed, found.problems
    assert (found.codes, found.codes_wrong, found.activations_wrong) == (76_288, 0, 0)
    assert found.top1_agreement >= 0.99


@pytest.mark.parametrize("bits", WIDTHS)
def test_truncation_gives_the_bytes_of_a_direct_export(exported_once, runtime_tflite, bits):
    assert truncate_file(runtime_tflite, bits) == fixed(exported_once, bits)


def test_every_width_answers_as_its_fixed_file(exported_once, runtime_tflite, digits_samples):
    model = SwitchableModel(runtime_tflite)
    assert model.widths == tuple(WIDTHS)
    x = digits_samples.inputs[:5]
    for bits in (8, 1, 4, 8, 2, 3, 5, 6, 7):
        model.bits = bits
        got = model.run(np.moveaxis(x, 1, -1))
        assert np.array_equal(got, run_file(fixed(exported_once, bits), x).output)
    with pytest.raises(InputError, match=r"takes samples of shape \(8, 8, 1\), channels last, not \(1, 8, 8\)"):
        model.run(x)
    with pytest.raises(InputError, match="the inputs have 0 samples"):
        model.run(np.zeros((0, 8, 8, 1)))


# Networks of every layer kind, with negative BatchNorm gains


def convert(network, shape, widths, scheme=Scheme(), activation_bits=(), kernel="exact"):
    model = model_of(network, shape, widths, scheme, activation_bits)
    models = [onnx.load_from_string(content) for _, content in export_onnx(model, tuple(widths))]
    return model, *convert_to_runtime_tflite(models, kernel)


def assert_right(model, content, fixed_files):
    x = np.random.default_rng(0).random((4, *model.info.input_shape), np.float32)
    for bits, direct in fixed_files.items():
        found = compare(model, bits, run_file(content, x, bits), x)
        assert found.passed, (bits, found.problems)
        assert found.codes > 0
        assert truncate_file(content, bits) == direct


def test_layer_kinds_and_a_channel_that_batch_norm_silenced():
    network = randomize_(prepare(Layers(), (1, 4, 8)), 5)
    for bits in ("1", "4", "8"):
        network.norm2.bn_dict[bits].weight.data[3] = 0
    assert_right(*convert(network, (3, 9, 10), (1, 4, 8)))


def test_bias_correction_and_widths_of_different_activation_kinds():
    scheme = Scheme(bias_correction=True)
    network = randomize_(prepare(Layers(), (1, 4, 8), scheme=scheme), 4)
    assert_right(*convert(network, (3, 9, 10), (1, 4, 8), scheme, (1, 4, 32)))


def test_one_dimensional_and_fully_connected_layers_and_fixed_files_of_the_dynamic_kernel():
    network = randomize_(prepare(one_dimensional(), (2, 8)), 6)
    assert_right(*convert(network, (3, 14), (2, 8), kernel="dynamic"))


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [(Scheme(), "dynamic"), (Scheme(bias_correction=True), "dynamic")],
)
def test_fixed_files_of_the_dynamic_kernel_come_back_with_every_form_of_filter(scheme, kernel):
    network = randomize_(prepare(Layers(), (1, 4, 8), scheme=scheme), 3)
    network.norm2.bn_dict["8"].weight.data[3] = 0
    assert_right(*convert(network, (3, 9, 10), (1, 4, 8), scheme, kernel=kernel))


@pytest.mark.parametrize("more", [[], ["twice"]])
def test_float_layers_are_stored_once_and_come_back_bit_for_bit(more):
    network = prepare(FloatLayers(), (1, 4, 8), float_layers=["first", "shortcut", "last", *more])
    network = randomize_(network, 7)
    if more:
        network.norm1.bn_dict["4"].weight.data[3] = 0  # a silenced channel says nothing about its weights
    model, content, fixed_files = convert(network, (2, 7, 6), (1, 4, 8))
    held = unpack(content)[0]
    weights = [tensor.buffer for graph in held.subgraphs for tensor in graph.tensors if tensor.name.endswith(b".float")]
    assert len(weights) == 3 + 3 + 2 + 6 * len(more)  # at 1 bit there is nothing to divide the classifier by
    assert len(set(weights)) == 3 + len(more)
    assert_right(model, content, fixed_files)


# What is refused


def test_rounded_codes_and_single_widths_are_refused(exported_once):
    scheme = Scheme("dorefa")
    network = prepare(nn.Sequential(nn.Linear(4, 3)), (2, 8), scheme=scheme, float_layers=[])
    with pytest.raises(InputError, match="dorefa cannot switch"):
        convert(network, (4,), (2, 8), scheme)
    with pytest.raises(UsageError, match="at least two widths"):
        convert_to_runtime_tflite([onnx.load(exported_once / "out" / "ckpt-w8.onnx")])


def test_a_file_of_one_width_is_refused_with_the_way_out(exported_once):
    path = exported_once / "out" / "ckpt-w8.tflite"
    with pytest.raises(InputError, match=r"ckpt-w8.tflite holds one width only \(8 bits\).*--bits runtime"):
        truncate_file(path, 4)
    assert SwitchableModel(path).widths == (8,)


def test_damaged_foreign_and_changed_files_are_refused(runtime_tflite):
    for content in (
        runtime_tflite[:200],
        runtime_tflite[: len(runtime_tflite) // 2],
        b"\x00" * 4 + b"TFL3" + b"\x00" * 64,
    ):
        with pytest.raises(InputError, match="the file is not a valid TFLite file"):
            truncate_file(content, 4)
    with pytest.raises(InputError, match="cannot be truncated to 9"):
        truncate_file(runtime_tflite, 9)
    codes = max(buffers(runtime_tflite), key=len)
    changed = codes[:9] + bytes([codes[9] ^ 0x80]) + codes[10:]
    assert runtime_tflite.count(codes) == 1
    with pytest.raises(InputError, match="was changed or damaged since its export"):
        truncate_file(runtime_tflite.replace(codes, changed), 1)


def test_one_changed_code_is_caught_by_verification(digits, digits_samples, runtime_tflite):
    codes = max(buffers(runtime_tflite), key=len)
    content = runtime_tflite.replace(codes, codes[:9] + bytes([codes[9] ^ 0x80]) + codes[10:])
    x = digits_samples.inputs[:4]
    for bits in (1, 8):
        found = compare(digits, bits, run_file(content, x, bits), x)
        assert found.codes_wrong == 1
        assert "1 of 36864 codes differ" in found.problems[0]
