"""One ONNX file for every width: right at each, refusing every other, and giving the fixed files back."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from networks import Layers, model_of, randomize_
from onnx import numpy_helper
from places import artifact
from torch import nn

from tqexport import Scheme, prepare
from tqexport.artifacts.truncate import truncate_file
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.file import read_facts
from tqexport.backends.onnx.runtime_file import merge_onnx
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)


@pytest.fixture(scope="module")
def files(exported_once) -> dict[int, bytes]:
    return {bits: artifact(exported_once, "onnx", bits) for bits in WIDTHS}


def values_of(content):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(content).graph.initializer}


def raw_run(content, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(content, options).run(None, feeds)


# The file


def test_one_set_of_codes_and_a_required_scalar_input(files, runtime_onnx):
    model = onnx.load_from_string(runtime_onnx)
    codes = {
        name: value for name, value in values_of(runtime_onnx).items() if value.dtype == np.uint8 and value.ndim > 2
    }
    assert len(codes) == 8
    assert sum(value.size for value in codes.values()) == 76_288
    assert all(np.array_equal(value, values_of(files[8])[name]) for name, value in codes.items())
    assert [node.op_type for node in model.graph.node].count("BitShift") == 8
    bits = model.graph.input[1]
    assert bits.name == "bits"
    assert bits.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert len(bits.type.tensor_type.shape.dim) == 0
    assert "bits" not in values_of(runtime_onnx)
    assert read_facts(model).widths == tuple(WIDTHS)


def test_the_file_is_hardly_larger_than_its_codes_and_tables(runtime_onnx):
    values = values_of(runtime_onnx)
    tables = sum(value.size for name, value in values.items() if name.endswith("/table"))
    assert tables > 8 * 1000
    assert len(runtime_onnx) <= 1.03 * (76_288 + 4 * tables) + 30_000


def test_the_same_files_in_any_order_give_the_same_bytes(files, runtime_onnx):
    assert merge_onnx(reversed(files.items())) == runtime_onnx


# What it computes


@pytest.mark.parametrize("bits", WIDTHS)
def test_parity_on_real_digits_at_every_width(digits, digits_samples, runtime_onnx, bits):
    run = run_file(runtime_onnx, digits_samples.inputs, bits)
    found = compare(digits, bits, run, digits_samples.inputs, digits_samples.labels)
    assert found.passed, found.problems
    assert (found.codes, found.codes_wrong, found.activations_wrong) == (76_288, 0, 0)
    assert found.flips < 100
    assert found.accuracy == pytest.approx(found.reference_accuracy, abs=0.003)


def test_one_session_switches_back_and_forth(digits_samples, files, runtime_onnx):
    x = digits_samples.inputs[:4]
    session = ort.InferenceSession(runtime_onnx)
    for bits in (8, 1, 8, 2, 5, 1):
        got = session.run(None, {"input": x, "bits": np.array(bits, np.uint8)})[0]
        assert np.allclose(got, raw_run(files[bits], {"input": x})[0], atol=1e-4)


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 6, 7, 9, 16, 32, 255])
def test_a_width_the_file_lacks_fails_in_the_run(files, bits):
    content = merge_onnx((width, files[width]) for width in (2, 4, 8))
    feeds = {"input": np.zeros((1, 1, 8, 8), np.float32)}
    with pytest.raises(Exception, match=r"bits must be one of 2, 4, 8"):
        raw_run(content, {**feeds, "bits": np.array(bits, np.uint8)})
    for allowed in (2, 4, 8):
        raw_run(content, {**feeds, "bits": np.array(allowed, np.uint8)})


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (None, r"Required inputs \(\['bits'\]\) are missing"),
        (np.array(4, np.int64), "Unexpected input data type"),
        (np.array(4.0, np.float32), "Unexpected input data type"),
        (np.array([4], np.uint8), "bits/uint8/row"),
    ],
)
def test_bits_is_required_and_a_uint8_scalar(runtime_onnx, bits, message):
    feeds = {"input": np.zeros((1, 1, 8, 8), np.float32)} | ({} if bits is None else {"bits": bits})
    with pytest.raises(Exception, match=message):
        raw_run(runtime_onnx, feeds)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_no_optimisation_of_onnxruntime_takes_the_switch_or_the_check_away(digits_samples, files, runtime_onnx, level):
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    session = ort.InferenceSession(runtime_onnx, options)
    x = digits_samples.inputs[:2]
    for bits in (2, 8):
        got = session.run(None, {"input": x, "bits": np.array(bits, np.uint8)})[0]
        assert np.allclose(got, raw_run(files[bits], {"input": x})[0], atol=1e-4)
    with pytest.raises(Exception, match="bits must be one of"):
        session.run(None, {"input": x, "bits": np.array(0, np.uint8)})


@pytest.mark.parametrize(
    ("scheme", "activation_bits"),
    [(Scheme(), ()), (Scheme(bias_correction=True), (4, 4, 4)), (Scheme(), (32, 32, 32))],
)
def test_layer_kinds_with_negative_batch_norm_gains(scheme, activation_bits):
    network = randomize_(prepare(Layers(), (1, 4, 8), scheme=scheme), 3)
    model = model_of(network, (3, 9, 10), scheme=scheme, activation_bits=activation_bits)
    files = dict(export_onnx(model, (1, 4, 8)))
    content = merge_onnx(files.items())
    x = np.random.default_rng(0).random((5, 3, 9, 10), np.float32)
    for bits, fixed in files.items():
        found = compare(model, bits, run_file(content, x, bits), x)
        assert found.passed, found.problems
        assert truncate_file(content, bits) == fixed


def test_a_batch_norm_of_one_channel():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 2, 1)
    )
    model = model_of(randomize_(prepare(network, (2, 8)), 1), (1, 3, 3), (2, 8))
    files = dict(export_onnx(model, (2, 8)))
    content = merge_onnx(files.items())
    assert all(truncate_file(content, bits) == fixed for bits, fixed in files.items())


# What is refused


def test_rounded_codes_are_refused():
    network = prepare(nn.Sequential(nn.Linear(4, 3)), (2, 8), scheme=Scheme("dorefa"), float_layers=[])
    model = model_of(network, (4,), (2, 8), Scheme("dorefa"))
    with pytest.raises(InputError, match=r"dorefa cannot switch .* must not be shifted"):
        merge_onnx(export_onnx(model, (2, 8)))


def test_widths_that_do_not_share_one_graph_are_refused():
    network = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), (2, 4, 8), float_layers=[])
    model = model_of(network, (4,), (2, 4, 8), activation_bits=(2, 4, 32))
    with pytest.raises(InputError, match=r"2 bits with 2-bit activations and 8 bits with 32-bit activations"):
        merge_onnx(export_onnx(model, (2, 4, 8)))
    assert merge_onnx(export_onnx(model, (2, 4)))


def test_widths_of_another_network_are_refused(files):
    other = model_of(randomize_(prepare(Layers(), (1, 4, 8)), 3), (3, 9, 10))
    with pytest.raises(InputError, match="do not share one graph"):
        merge_onnx([(8, files[8]), *export_onnx(other, (4,))])


@pytest.mark.parametrize("widths", [(), (4,), (4, 4)])
def test_one_width_is_nothing_to_switch(files, widths):
    with pytest.raises(UsageError, match="at least two widths"):
        merge_onnx((width, files[width]) for width in widths)


def test_a_module_named_bits_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.bits = nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.bits(x))

    with pytest.raises(ConversionError, match="named 'bits'"):
        merge_onnx(export_onnx(model_of(prepare(Named(), (2, 8), float_layers=[]), (4,), (2, 8)), (2, 8)))


# Truncation


@pytest.mark.parametrize("bits", WIDTHS)
def test_truncation_gives_the_bytes_of_a_direct_export(files, runtime_onnx, tmp_path, bits):
    path = tmp_path / "net.onnx"
    path.write_bytes(runtime_onnx)
    assert truncate_file(path, bits) == truncate_file(runtime_onnx, bits) == files[bits]


def test_a_file_of_one_width_is_refused_with_the_way_out(files, tmp_path):
    path = tmp_path / "net-w8.onnx"
    path.write_bytes(files[8])
    with pytest.raises(InputError, match=r"net-w8.onnx holds one width only \(8 bits\).*--bits runtime"):
        truncate_file(path, 4)


def test_a_width_the_file_lacks_is_refused(files):
    content = merge_onnx((width, files[width]) for width in (2, 8))
    for bits in (0, 4, 9):
        with pytest.raises(InputError, match=rf"holds 2, 8 bits, so it cannot be truncated to {bits}"):
            truncate_file(content, bits)


def test_damaged_and_foreign_files_are_refused(runtime_onnx, tmp_path):
    foreign = onnx.load_from_string(runtime_onnx)
    del foreign.metadata_props[:]
    for content in (b"", b"hello", runtime_onnx[: len(runtime_onnx) // 2], foreign.SerializeToString()):
        with pytest.raises(InputError, match=r"the file (is not a valid ONNX|was not written by tqexport)"):
            truncate_file(content, 4)
    with pytest.raises(InputError, match=r"nothing.onnx cannot be read: No such file"):
        truncate_file(tmp_path / "nothing.onnx", 4)


@pytest.mark.parametrize("name", ["layers.1.conv1.weight.codes", "bits/float32/table", "bits/float32/sizes"])
def test_a_file_that_was_changed_is_refused(runtime_onnx, name):
    model = onnx.load_from_string(runtime_onnx)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 0x40]) + tensor.raw_data[1:]
    with pytest.raises(InputError, match="was changed or damaged since its export"):
        truncate_file(model.SerializeToString(), 1)
