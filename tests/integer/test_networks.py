"""Other networks than the fixture: every kind of layer, in every runtime, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from integer_networks import CASES, Shortcuts, calibrated_case
from integer_runs import TFLITE_ROUNDINGS, integer_verdicts, onnx_session, run_tflite_levels
from networks import randomize_
from torch import nn

from tqexport import CheckpointInfo, TruncModel, prepare
from tqexport.backends import BACKENDS
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.integer_runtime_file import runtime_integer_onnx
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.backends.tflite.integer_runtime import open_integer_runtimes
from tqexport.errors import ConversionError, InputError
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.grids import grids_of
from tqexport.integer.model import Convolution
from tqexport.integer.names import FLOAT_IO, INTEGER
from tqexport.integer.naming import INPUT
from tqexport.training.quantizers import Clamp
from tqexport.truncation import Scheme


@pytest.fixture(scope="module", params=CASES)
def network(request):
    return calibrated_case(request.param)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_every_runtime_equals_the_integer_model(network, bits):
    model, inputs = network
    integers = integer_model(model, bits)
    (found,) = onnx_session(integer_onnx(model, bits)).run(None, {INPUT: inputs})
    assert np.array_equal(found, integers.to_floats(integers.output, integers.run(inputs)[integers.output]))
    content = integer_tflite(model, bits)
    for rounding in TFLITE_ROUNDINGS:
        values = integers.run(inputs[:3], rounding)
        assert np.array_equal(run_tflite_levels(content, values[INPUT], rounding), values[integers.output]), rounding


def test_files_of_a_batch_equal_the_integer_model_in_every_runtime(network):
    """Five samples in a file of three: the second batch is filled up."""
    model, inputs = network
    integers = integer_model(model, 4)
    for kernel in (INTEGER, FLOAT_IO):
        content = integer_tflite(model, 4, kernel, batch=3)
        assert BACKENDS["tflite"].batch(content) == 3
        for runtime in open_integer_runtimes(content, integers):
            expected = integers.run(inputs[:5], runtime.rounding)
            found = runtime.run(inputs[:5])
            assert np.array_equal(found.outputs, expected[integers.output]), runtime.name
            assert all(np.array_equal(values, expected[name]) for name, values in found.values.items()), runtime.name


@pytest.mark.parametrize("batch", [0, 1 << 20])
def test_a_batch_that_no_file_of_ours_has_is_refused(network, batch):
    model, _ = network
    flat = FlatModel(integer_tflite(model, 4))
    source = flat.tensor(int(flat.graph.inputs[0]))
    source.shape = np.array([batch, *source.shape[1:]], np.int32)
    with pytest.raises(InputError, match=r"samples at once; tqexport writes|its batch is too large"):
        next(open_integer_runtimes(flat.pack(), integer_model(model, 4)))


def model_of(module: nn.Module, shape: tuple[int, ...], scheme: Scheme = Scheme()) -> TruncModel:
    info = CheckpointInfo("test", {}, shape, (2, 8), scheme)
    model = TruncModel(randomize_(prepare(module, (2, 8), scheme=scheme), 0), info)
    return calibrate(model, np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32))


def three_convolutions(**middle) -> nn.Module:
    first, last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 3, **middle), nn.BatchNorm2d(4), nn.ReLU(), last)


def test_a_gain_of_zero_leaves_the_bias():
    module = three_convolutions()
    model = TruncModel(randomize_(prepare(module, (2, 8)), 0), CheckpointInfo("test", {}, (2, 8, 8), (2, 8)))
    with torch.no_grad():
        for norm in model.module[3].bn_dict.values():
            norm.weight[1] = 0
            norm.weight[2] = 1e-12
    inputs = np.random.default_rng(0).normal(size=(32, 2, 8, 8)).astype(np.float32)
    model = calibrate(model, inputs)
    for bits in (2, 8):
        network = integer_model(model, bits)
        (layer,) = (each for each in network.operations if isinstance(each, Convolution) and each.name == "2")
        assert layer.signs[1] == layer.signs[2] == 0
        (found,) = onnx_session(integer_onnx(model, bits)).run(None, {INPUT: inputs})
        assert np.array_equal(found, network.to_floats(network.output, network.run(inputs)[network.output]))


def test_a_clamp_has_the_grid_of_its_range():
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), Clamp(), nn.Conv2d(4, 2, 1))
    grid = integer_model(model_of(module, (2, 8, 8)), 2).grids["3"]
    assert (grid.scale, grid.zero_point) == (pytest.approx(1 / 255), 0)


def test_a_layer_corrected_for_bias_is_refused_by_name():
    with pytest.raises(ConversionError, match="2 is corrected for bias"):
        model_of(three_convolutions(), (2, 8, 8), Scheme(bias_correction=True))


def test_reflected_padding_is_refused_by_name():
    with pytest.raises(ConversionError, match="2 pads with reflect"):
        model_of(three_convolutions(padding=1, padding_mode="reflect"), (2, 8, 8))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_verification_finds_every_network_right_in_every_runtime(network, bits):
    model, inputs = network
    for content in (integer_onnx(model, bits), integer_tflite(model, bits)):
        for runtime, verdict in integer_verdicts(model, bits, content, inputs[:4]).items():
            assert verdict.passed, (runtime, verdict.problems)


@pytest.mark.parametrize("reach", [2.0**-6, 1.0, 2.0**6])
def test_grids_far_apart_are_no_difference(reach):
    """XNNPACK moves values to another grid by whole 256ths, and leaves ratios that it does not take to LiteRT."""
    model = calibrated_with(Shortcuts(), (3, 9, 8))
    grids = grids_of(model.module)
    grids.scale[:, grids.names.index("cat")] *= reach
    for bits in (2, 8):
        inputs = np.random.default_rng(1).normal(size=(8, 3, 9, 8)).astype(np.float32)
        for runtime, verdict in integer_verdicts(model, bits, integer_tflite(model, bits), inputs).items():
            assert verdict.passed, (bits, runtime, verdict.problems)


def test_biases_in_coarse_units_may_move_a_level_by_more_than_one():
    """At 1 bit a linear layer's own bias counts in units of several levels."""
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    module[3].bias.data[:] = torch.tensor([0.31, -0.17, 0.05])
    model = calibrated_with(module, (2, 3, 3), float_layers=["0"])
    grids = grids_of(model.module)
    grids.scale[:, grids.names.index("3")] /= 64
    inputs = np.random.default_rng(1).normal(size=(32, 2, 3, 3)).astype(np.float32)
    (verdict,) = integer_verdicts(model, 2, integer_onnx(model, 2), inputs).values()
    assert verdict.passed, verdict.problems
    assert verdict.flip_bound > 1


def test_what_litert_does_not_multiply_by_is_refused_by_name():
    model = model_of(three_convolutions(), (2, 8, 8))
    grids = grids_of(model.module)
    grids.scale[:, grids.names.index("input")] *= 1e6
    with pytest.raises(ConversionError, match="one step of what 0 reads makes"):
        integer_tflite(model, 2)


def test_a_sum_that_would_end_the_process_is_refused_by_name():
    model = calibrated_with(Shortcuts(), (3, 9, 8))
    grids = grids_of(model.module)
    grids.scale[:, grids.names.index("norm")] *= 1e9
    with pytest.raises(ConversionError, match="one step of what add reads makes"):
        integer_tflite(model, 2)


def calibrated_with(module: nn.Module, shape: tuple[int, ...], **options) -> TruncModel:
    info = CheckpointInfo("test", {}, shape, (2, 8))
    model = TruncModel(randomize_(prepare(module, (2, 8), **options), 0), info)
    return calibrate(model, np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32))


def test_widths_of_other_graphs_are_refused_with_what_is_in_one_alone():
    network = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)), (2, 4))
    randomize_(network, 0)
    network[1] = nn.ReLU()  # with a grid of its own
    model = TruncModel(network, CheckpointInfo("small", {}, (4,), (2, 4)))
    model = calibrate(model, np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32))
    grids = grids_of(model.module)
    grids.zero_point[grids.widths.index(4), grids.names.index("1")] = 3
    with pytest.raises(InputError, match=r"share one graph \(1:quantized is computed at 4 bits and not at 2\), so one"):
        runtime_integer_onnx(model, (2, 4))
