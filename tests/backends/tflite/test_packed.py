"""Packed files: TFLite Micro computes what the integer model says, and whatever is changed in them is found."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from commands import run
from integer_networks import CASES, calibrated_case
from integer_runs import integer_verdicts, run_tflite_levels
from networks import randomize_
from places import DIGITS_INT
from torch import nn

from tqexport import CheckpointInfo, TruncModel, load_checkpoint, prepare
from tqexport.backends import BACKENDS
from tqexport.backends.tflite import packing
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.backends.tflite.packing import STREAM_SUFFIX, TABLE_SUFFIX, pack_filter, unpacked_filters
from tqexport.errors import ConversionError, HostError, InputError, UsageError
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.model import Convolution
from tqexport.integer.names import PACKED
from tqexport.integer.naming import INPUT

EVERY_WIDTH = range(1, 8)
LAYER = "layers.2.conv1"

micro = pytest.mark.skipif(importlib.util.find_spec("tflite_micro") is None, reason="tflite-micro is not installed")


@pytest.fixture(scope="module")
def trained() -> TruncModel:
    """The digits network that was trained in integers."""
    return load_checkpoint(DIGITS_INT)


@pytest.fixture
def every_filter(monkeypatch):
    """Filters are packed whatever that costs, so that small networks show every kind of layer."""
    monkeypatch.setattr(packing, "_OVERHEAD", -1_000_000)


def agrees(model, bits, inputs):
    """Whether TFLite Micro computes the levels of the integer model from a packed file."""
    network = integer_model(model, bits)
    values = network.run(inputs, "tflm")
    found = run_tflite_levels(integer_tflite(model, bits, PACKED), values[INPUT], "tflm")
    return np.array_equal(found, values[network.output])


def verdict_of(model, bits, content, inputs):
    """A file against the integer model and PyTorch, in the only runtime that takes it."""
    ((runtime, verdict),) = integer_verdicts(model, bits, content, inputs, PACKED).items()
    assert runtime == "TFLite Micro integer"
    return verdict


def filters(content):
    """The packed filters of a file by name."""
    flat = FlatModel(content)
    return {flat.name(index): value for index, value in unpacked_filters(flat).items()}


@micro
@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_tflite_micro_equals_the_integer_model(trained, calibrated, held_out, bits):
    for model in (trained, calibrated):
        assert agrees(model, bits, held_out[:40])


@micro
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_equals_the_integer_model(every_filter, name):
    model, inputs = calibrated_case(name)
    for bits in (1, 2, 4):
        content = integer_tflite(model, bits, PACKED)
        flat = FlatModel(content)
        kinds = {flat.operator_name(operator) for operator in flat.graph.operators}
        assert kinds & {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}
        network = integer_model(model, bits)
        layers = [layer for layer in network.operations if isinstance(layer, Convolution) and layer.codes]
        assert {f"{layer.name}.weight" for layer in layers} <= set(filters(content))
        assert agrees(model, bits, inputs[:3])
        verdict = verdict_of(model, bits, content, inputs[:3])
        assert verdict.passed, verdict.problems


def test_the_networks_have_channels_of_both_signs_and_several_scales(every_filter):
    """What one table for all channels has to bear, in depthwise layers too."""
    model, _ = calibrated_case("mobilenet")
    layers = [layer for layer in integer_model(model, 2).operations if isinstance(layer, Convolution) and layer.codes]
    for depthwise in (False, True):
        chosen = [layer for layer in layers if (layer.groups > 1) == depthwise]
        assert any({-1, 1} <= set(layer.signs.tolist()) and len(set(layer.scale)) > 2 for layer in chosen)


@micro
@pytest.mark.parametrize("bits", [1, 2, 7])
def test_channels_whose_gain_is_zero_take_one_more_value(bits):
    widths = (1, 2, 7)
    module = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 2, 1)
    )
    info = CheckpointInfo("test", {}, (2, 8, 8), widths)
    model = TruncModel(randomize_(prepare(module, widths), 0), info)
    with torch.no_grad():
        for norm in model.module[3].bn_dict.values():
            norm.weight[1] = 0
    inputs = np.random.default_rng(0).normal(size=(32, 2, 8, 8)).astype(np.float32)
    model = calibrate(model, inputs)
    if bits == 7:
        with pytest.raises(ConversionError, match="no layer is smaller when its weights of 7 bits are packed; use"):
            integer_tflite(model, bits, PACKED)
        return
    assert sorted(map(len, map(np.unique, filters(integer_tflite(model, bits, PACKED)).values()))) == [2**bits + 1]
    assert agrees(model, bits, inputs[:8])


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_files_are_smaller_and_the_same_each_time(trained, bits):
    plain, packed = integer_tflite(trained, bits), integer_tflite(trained, bits, PACKED)
    assert len(packed) < len(plain)
    assert packed == integer_tflite(trained, bits, PACKED)
    held = BACKENDS["tflite"].codes(plain, bits)
    unpacked = BACKENDS["tflite"].codes(packed, bits)
    assert list(held) == list(unpacked)
    assert all(np.array_equal(held[name][0], unpacked[name][0]) for name in held)
    assert BACKENDS["tflite"].facts(packed).kernel == PACKED


def test_no_file_is_larger_than_the_plain_one():
    """Layers of sizes around the one from which packing pays."""
    seen = set()
    for size in range(15, 24):
        layers = [nn.Linear(8, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2)]
        module = nn.Sequential(nn.Sequential(nn.Sequential(*layers)))
        info = CheckpointInfo("test", {}, (8,), (1, 4))
        model = TruncModel(randomize_(prepare(module, (1, 4)), 0), info)
        model = calibrate(model, np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32))
        for bits in (1, 4):
            try:
                packed = integer_tflite(model, bits, PACKED)
            except ConversionError:
                seen.add(False)
                continue
            seen.add(True)
            assert len(packed) < len(integer_tflite(model, bits))
    assert seen == {True, False}


@pytest.mark.parametrize("bits", EVERY_WIDTH)
def test_the_stream_is_that_of_the_package(bits, every_filter):
    lut = pytest.importorskip("tflite_micro.tensorflow.lite.micro.compression.lut", reason="tflite-micro is missing")
    values = np.random.default_rng(bits).integers(-64, -64 + 2**bits, (5, 77)).astype(np.int8)
    values.flat[: 2**bits] = np.arange(-64, -64 + 2**bits)
    packed, other = pack_filter("name", values), lut.compress_array(values, None)
    assert packed is not None
    assert packed.stream.tobytes() == lut.pack_indices(other.indices, bits)
    data = lut.LutAncillaryData(bitwidth=bits, axis=lut.LutAncillaryData.PER_TENSOR_AXIS, value_table_stride=0)
    assert packed.table.tobytes()[4:16] == data.to_user_data()
    assert packed.table.tobytes()[16:] == other.lookup_tables[0].tobytes()


def changed(content, suffix, change):
    """A file with one constant of ``LAYER`` changed in place."""
    flat = FlatModel(content)
    index = flat.find(f"{LAYER}.weight{suffix}")
    value = flat.constant(index).copy()
    change(value)
    flat.set_constant(index, value)
    return flat.pack()


def rescaled(content):
    """A file with another scale in one of the channels of ``LAYER``."""
    flat = FlatModel(content)
    quantization = flat.tensor(flat.find(f"{LAYER}.weight")).quantization
    quantization.scale = np.array(quantization.scale)
    quantization.scale[5] *= np.float32(1.0001)
    return flat.pack()


def rewired(content):
    """A file whose decoder for ``LAYER`` reads a changed twin of its stream."""
    flat = FlatModel(content)
    stream = flat.find(f"{LAYER}.weight{STREAM_SUFFIX}")
    (decoder,) = flat.consumers(stream)
    flat.graph.tensors.append(copy.deepcopy(flat.tensor(stream)))
    twin = len(flat.graph.tensors) - 1
    decoder.inputs = np.array([twin, decoder.inputs[1]], np.int32)
    value = flat.constant(stream).copy()
    first_bit(value)
    flat.set_constant(twin, value)
    return flat.pack()


def first_value(table):
    table[16] += 2


def first_bit(stream):
    stream[0] ^= 0x80


DAMAGE = {
    "a value of the table": lambda content: changed(content, TABLE_SUFFIX, first_value),
    "a bit of the stream": lambda content: changed(content, STREAM_SUFFIX, first_bit),
    "the scale of a channel": rescaled,
    "a decoder that reads another stream": rewired,
}


@micro
@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_right_files_pass_and_changed_ones_name_the_layer(trained, held_out, bits, case):
    content = integer_tflite(trained, bits, PACKED)
    verdict = verdict_of(trained, bits, content, held_out[:8])
    assert verdict.passed, verdict.problems
    assert (verdict.codes, verdict.codes_wrong) == (76_288, 0)
    verdict = verdict_of(trained, bits, DAMAGE[case](content), held_out[:8])
    assert not verdict.passed
    assert verdict.problems[0].startswith(f"{LAYER}.weight")
    assert (verdict.diverged or "").startswith(LAYER)
    assert verdict.codes_wrong == 36_864


def usual_distance(table):
    table[6] = len(table) - 16


def half_a_place(table):
    table[5] &= 0xF8


@pytest.mark.parametrize("change", [usual_distance, half_a_place])
def test_what_the_decoder_would_read_beyond_is_refused(trained, change):
    """With the usual distance between tables TFLite Micro reads the second channel's from behind the only one."""
    content = changed(integer_tflite(trained, 2, PACKED), TABLE_SUFFIX, change)
    network = integer_model(trained, 2)
    message = f"packed filter {LAYER}.weight is damaged; export it again"
    with pytest.raises(InputError, match=message):
        list(BACKENDS["tflite"].open_integers(content, lambda _: network, 2, switched=False))
    with pytest.raises(InputError, match=message):
        BACKENDS["tflite"].codes(content, 2)


@pytest.mark.parametrize("suffix", [STREAM_SUFFIX, TABLE_SUFFIX])
def test_a_shortened_constant_is_refused(trained, suffix):
    flat = FlatModel(integer_tflite(trained, 4, PACKED))
    index = flat.find(f"{LAYER}.weight{suffix}")
    value = flat.constant(index)[:-1]
    flat.tensor(index).shape = np.array(value.shape, np.int32)
    flat.set_constant(index, value)
    with pytest.raises(InputError, match=f"packed filter {LAYER}.weight is damaged"):
        unpacked_filters(flat)


@micro
def test_the_decoder_takes_a_table_for_each_scale(trained, held_out):
    """Why the distance is 0: with the usual one the same file computes something else, and nothing says so."""
    content = integer_tflite(trained, 2, PACKED)
    levels = integer_model(trained, 2).run(held_out[:8], "tflm")[INPUT]
    right = run_tflite_levels(content, levels, "tflm")
    assert not np.array_equal(run_tflite_levels(changed(content, TABLE_SUFFIX, usual_distance), levels, "tflm"), right)


def test_eight_bits_are_refused(trained):
    with pytest.raises(UsageError, match=r"8 bits cannot be packed; name widths of 1 to 7 bits.* --kernel integer"):
        integer_tflite(trained, 8, PACKED)


def test_litert_does_not_take_it_and_says_why(trained):
    content = integer_tflite(trained, 4, PACKED)
    with pytest.raises(InputError, match="packed for TFLite Micro, and LiteRT does not unpack them; export"):
        BACKENDS["tflite"].open_session(content)
    inputs, outputs = BACKENDS["tflite"].describe(content)
    assert (inputs, outputs) == BACKENDS["tflite"].describe(integer_tflite(trained, 4))


@micro
def test_a_packed_file_goes_through_every_command(tmp_path, monkeypatch):
    def tqexport(*arguments, code=0):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    shutil.copy(DIGITS_INT, tmp_path / "net.pt")
    packed = ("tflite", "net.pt", "--kernel", "integer-packed")
    assert "8 bits cannot be packed" in tqexport(*packed, code=2)
    assert "cannot hold several widths" in tqexport(*packed, "--bits", "runtime", code=2)
    assert not list((tmp_path / "tqexport-out").iterdir())
    assert "net-w2-integer-packed.tflite" in tqexport(*packed, "--bits", "2")
    said = run("verify", "--runtime", "tflm", "--samples", "4", "--json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert ("net-w2-integer-packed.tflite", "TFLite Micro integer") in {
        (check["artifact"], check["runtime"]) for check in json.loads(said.stdout)["results"]
    }
    every = tqexport("verify", "--samples", "2")
    assert "packed files run in TFLite Micro alone: LiteRT has no operator that unpacks weights" in every
    shown = tqexport("inspect", "tqexport-out/net-w2-integer-packed.tflite")
    assert "kernel integer-packed: weights that are smaller so are bit streams" in shown
    assert "36,864" in shown

    hide = (
        "import importlib.util\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'tflite_micro' else find_spec(name, *rest)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hide)  # for the process that runs the file
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tflite_micro" else find_spec(name))
    absent = "TFLite Micro is not installed: pip install 'tqexport[devices]'"
    assert absent in tqexport(*packed, "--bits", "4", code=4)
    assert absent in tqexport("verify", "--samples", "2", code=4)
    with pytest.raises(HostError, match="TFLite Micro is not installed"):
        BACKENDS["tflite"].check_environment(PACKED)
