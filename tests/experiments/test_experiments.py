"""The experiments measure what they say, and the documents show what was measured."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
import torch
from networks import randomize_
from onnx import numpy_helper

from experiments import convergence, dummy_tensor, learned_ranges, open_questions, robustness, storage, tables
from experiments.data import Data, digits, shifted, waves
from experiments.networks import CodedActivation, conv1d, transformer, with_coded_activations
from experiments.results import RESULTS, in_parallel, spread
from experiments.training import Recipe, accuracy, train
from tqexport import ActivationQuantizer, CheckpointInfo, Scheme, TruncModel, at_width, prepare
from tqexport.analysis.gap import measure_gap
from tqexport.backends import run_file
from tqexport.networks.research_models import resnet50q
from tqexport.networks.tiny_models import resnet8
from tqexport.training.quantizers import quantized_weights, set_quantizer
from tqexport.truncation import FLOAT_BITS, direct_codes, max_code, normalize


def test_digits_are_held_out_and_differ_by_seed():
    first, same, other = digits(0), digits(0), digits(1)
    assert len(first.train_x) + len(first.test_x) == 1797
    assert torch.equal(first.test_y, same.test_y)
    assert not torch.equal(first.test_y, other.test_y)
    assert abs(float(first.train_x.mean())) < 1e-5
    train_set = {row.numpy().tobytes() for row in first.train_x}
    assert sum(row.numpy().tobytes() in train_set for row in first.test_x) <= 3  # the data have twins


def test_augmentation_moves_by_up_to_one_pixel():
    images = torch.rand(50, 1, 8, 8)
    images[0, 0, 0, 0] = -1  # the background
    moved = shifted(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1)
    found = set()
    for image, source in zip(moved, padded, strict=True):
        matches = [(y, x) for y in range(3) for x in range(3) if torch.equal(image, source[:, y : y + 8, x : x + 8])]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) == 9


def test_signals_follow_their_formula():
    data = waves(3, train=200, test=50, noise=0.0)
    assert (data.train_x.shape, data.test_x.shape) == ((200, 1, 64), (50, 1, 64))
    x, y = data.train_x[:, 0], data.train_y
    assert sorted(y.unique().tolist()) == [0, 1, 2, 3]
    assert float(x.abs().max()) <= 1 + 1e-6
    assert set(x[y == 1].unique().tolist()) <= {-1.0, 0.0, 1.0}
    step = (x[:, 1:] - x[:, :-1]).abs()
    assert float(step[y == 2].max()) > 1.5  # the sawtooth jumps, sine and triangle do not
    assert float(step[y == 0].max()) < 2 * math.pi * 6 / 64
    assert float(step[y == 3].max()) <= 4 * 6 / 64 + 1e-6
    assert torch.equal(waves(3, train=200, test=50, noise=0.0).train_x, data.train_x)


def test_dummy_tensor_results_are_those_committed():
    measured = dummy_tensor.measure()
    assert all(row["changed"] == row["largest_difference"] == 0 for row in measured["truncquant"])
    changed = {row["bits"]: row["changed"] for row in measured["dorefa"]}
    assert changed[2] == pytest.approx(2 * (1 / 4 - 1 / 6), abs=0.005)  # from the thresholds 1/6 and 5/6 to 1/4 and 3/4
    assert json.loads((RESULTS / "dummy_tensor.json").read_text())["table"] == measured


def test_spread_is_mean_and_sample_deviation():
    assert spread([0.9, 0.95, 1.0]) == {"mean": 95.0, "deviation": 5.0, "values": [90.0, 95.0, 100.0]}


def test_processes_give_results_in_order():
    assert list(in_parallel(math.sqrt, [1.0, 4.0, 9.0], workers=2)) == [1, 2, 3]


def test_convergence_covers_every_way_and_width():
    every = convergence.jobs(seeds=2, epochs=3)
    assert len(every) == 2 * (1 + 6 + 6 + 1)
    curves = {bits: [0.5, 0.8] for bits in (*convergence.WIDTHS, FLOAT_BITS)}
    table = convergence.collect([(job, {bits: curves[bits] for bits in job.widths}) for job in every])
    assert list(table["float"]) == ["32"]
    assert all(list(table[way]) == ["1", "2", "3", "4", "6", "8"] for way in table if way != "float")
    assert table["ordinary"]["3"]["curve"] == [50.0, 80.0]
    assert len(table["TruncQuant, joint"]["3"]["values"]) == 2


@pytest.mark.parametrize("way", ["float", "ordinary"])
def test_a_convergence_run_measures_after_each_epoch(way):
    bits = FLOAT_BITS if way == "float" else 4
    curves = convergence.run(convergence.Job(way, (bits,), seed=0, epochs=2))
    assert list(curves) == [bits]
    assert len(curves[bits]) == 2
    assert curves[bits][1] > 0.12


@pytest.fixture(scope="module")
def robustness_rows():
    """One epoch of both networks, every file made and run."""
    return robustness.run(robustness.Job(seed=0, epochs=1))


def test_accuracies_come_from_files_that_equal_pytorch(robustness_rows):
    assert len(robustness_rows) == 12
    for row in robustness_rows:
        assert row.verified is (None if row.way == robustness.TRUNCATED else True)
        assert set(row.accuracy) == {"PyTorch", "ONNX", "TFLite"}
        assert max(row.accuracy.values()) - min(row.accuracy.values()) <= 3 / 450  # flips
    table = robustness.collect([robustness_rows, robustness_rows])
    assert table[robustness.TRUNCQUANT]["TFLite"]["2"]["deviation"] == 0


@pytest.mark.parametrize("bits", [2, 4])
def test_the_truncated_file_really_shifts_rounded_codes(bits):
    network = randomize_(resnet8(1, 10, 4, widths=robustness.WIDTHS), 0)
    set_quantizer(network, Scheme("dorefa"))
    model = TruncModel(network, CheckpointInfo("resnet8", {}, (1, 8, 8), robustness.WIDTHS, Scheme("dorefa")))
    content = robustness.truncated_onnx(model, bits)
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(content).graph.initializer}
    codes = run_file(content, np.zeros((1, 1, 8, 8), np.float32)).codes
    for name, weight in quantized_weights(network).items():
        stored = direct_codes(normalize(weight.original.detach()), 8, "dorefa").numpy().astype(np.uint8)
        assert np.array_equal(values[f"{name}.codes"], stored)
        assert values[f"{name}.shift"] == 8 - bits
        (computed,) = codes[name]
        assert np.array_equal(computed, stored >> (8 - bits))


def test_coded_activations_round_floor_and_shift():
    x = torch.linspace(-0.5, 1.5, 4001, requires_grad=True)
    rounded, floored = CodedActivation("dorefa"), CodedActivation("truncquant")
    with torch.no_grad():
        for bits in (1, 2, 4, 8):
            rounded.stored = floored.stored = False
            plain = ActivationQuantizer()
            plain.bits = rounded.bits = floored.bits = bits
            assert torch.allclose(rounded(x), plain(x))
            direct, floor = rounded(x), floored(x)
            rounded.stored = floored.stored = True
            assert torch.allclose(floored(x), floor)
            assert float((floor * max_code(bits)).max()) == max_code(bits)
            if bits in (2, 4):
                assert float((rounded(x) != direct).float().mean()) > 0.03
    floored(x).sum().backward()
    assert torch.equal(x.grad, ((x >= 0) & (x <= 1)).float())
    network = with_coded_activations(resnet8(1, 10, 4), "truncquant")
    with at_width(network, 2):
        bits = {module.bits for module in network.modules() if isinstance(module, CodedActivation)}
    assert bits == {2}
    assert not any(type(module) is ActivationQuantizer for module in network.modules())


@pytest.mark.parametrize(("build", "load"), [(conv1d, waves), (transformer, digits)])
def test_other_networks_train_and_truncate_without_a_gap(build, load):
    data = load(0)
    network = prepare(build(), (2, 8))
    train(network, data, (2, 8), epochs=1, seed=0)
    assert accuracy(network, data, 8) > 0.12
    model = TruncModel(network, CheckpointInfo("test", {}, tuple(data.test_x.shape[1:]), (2, 8)))
    gap = measure_gap(model, (2, 8), (data.test_x.numpy(),), data.test_y.numpy())
    assert gap.closed
    assert [width.accuracy.truncated for width in gap.widths] == pytest.approx(
        [accuracy(network, data, bits) for bits in (2, 8)], abs=0.01
    )


def test_a_recipe_reaches_the_layers():
    network = resnet8(1, 10, 4, widths=(2, 8))
    few = Data(*(part[:64] for part in vars(digits(0)).values()))
    train(network, few, (2, 8), epochs=1, seed=0, recipe=Recipe(Scheme("dorefa"), "scaled"))
    weights = quantized_weights(network).values()
    assert {(weight.scheme, weight.quantizer.estimator) for weight in weights} == {(Scheme("dorefa"), "scaled")}


def test_open_questions_are_sorted_into_their_tables():
    every = open_questions.jobs(seeds=2, epochs=1)
    assert len(every) == 2 * (6 + 6)
    weights = {"quantised": {2: 0.9}, "truncated": {2: 0.8}}
    activations = {"activations quantised": {2: 0.7}, "activations truncated": {2: 0.6}}
    outcomes = {
        ("TruncQuant", ""): open_questions.Outcome(weights | activations, {}),
        ("ordinary", "transformer"): open_questions.Outcome(weights, {"ONNX": "equal"}),
    }
    runs = [(open_questions.Job(*key[:1], seed, 1, key[1]), out) for key, out in outcomes.items() for seed in (0, 1)]
    table = open_questions.collect(runs)
    assert table["recipes"]["TruncQuant"]["truncated"]["2"]["mean"] == 80
    assert table["activations"]["TruncQuant"]["truncated"]["2"]["mean"] == 60
    assert list(table["networks"]) == ["transformer, ordinary"]
    assert table["files"] == {"transformer, ordinary": {"ONNX": "equal"}}


def test_storage_counts_every_initializer_once():
    network = resnet50q(widths=storage.JOINT, planes=4, num_classes=10)
    figures, rows = storage.measure(network, (3, 64, 64))
    codes = sum(weight.original.numel() for weight in quantized_weights(network).values())
    assert figures["codes_bytes"]["quantised weights"] == codes
    assert figures["float32_bytes"]["quantised weights"] == 4 * codes
    for column, kinds in ((2, figures["float32_bytes"]), (3, figures["codes_bytes"])):
        assert sum(row[column] for row in rows) == kinds["total"]
        for kind in storage.KINDS:
            assert sum(row[column] for row in rows if row[1] == kind) == kinds[kind]
    assert figures["float32_bytes"]["classifier"] == 4 * (128 * 10 + 10)
    assert figures["float32_bytes"]["float convolutions"] == figures["codes_bytes"]["float convolutions"]
    assert figures["total_bytes"]["packed, 4 bits"] == figures["codes_bytes"]["total"] - codes + (codes + 1) // 2
    assert figures["file_bytes_widths_1_2_4_8_in_one"] > figures["file_bytes_8_bits"] + 10_000
    assert {row[0] for row in rows} >= {"conv1.weight", "layer4.2.conv2.weight", "fc.bias"}


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.parent.name)
def test_the_documents_show_the_committed_results(document):
    text = document.read_text(encoding="utf-8")
    assert "<!-- table: robustness -->" in text
    assert tables.filled(text) == text
    for name in tables.TABLES if document.parent.name == "experiments" else ():
        assert f"<!-- table: {name} -->" in text


@pytest.mark.parametrize("network", learned_ranges.NETWORKS)
def test_a_run_with_learned_ranges_measures_every_width_and_says_what_was_learned(network, monkeypatch):
    few = Data(*(part[:128] for part in vars(digits(1)).values()))
    monkeypatch.setattr(learned_ranges, "digits", lambda seed: few)  # noqa: ARG005
    job = learned_ranges.Job(network, learned_ranges.LEARNED, seed=1, epochs=1)
    outcome = learned_ranges.run(job)
    assert list(outcome.shares) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert len(outcome.ranges) == {"transformer": 12, "GRU": 2}[network]
    assert not {4.0} & {*outcome.ranges.values()}  # which is what they are before training
    table = learned_ranges.collect([(job, outcome), (learned_ranges.Job(network, job.way, 2, 1), outcome)])
    assert list(table["accuracy_percent"][network][job.way]) == list("87654321")
    assert [*table["ranges"][network]] == [*table["gains_percent"][network]] == [*outcome.ranges]


def test_every_network_of_learned_ranges_is_compared_with_float_and_with_what_prepare_does_otherwise():
    every = learned_ranges.jobs(seeds=3, epochs=1)
    ways = {network: [job.way for job in every if job.network == network] for network in learned_ranges.NETWORKS}
    learned = [learned_ranges.LEARNED, learned_ranges.CORRECTED]
    assert ways["transformer"] == 3 * ["float", "0 to 1", *learned]
    assert ways["GRU"] == 3 * ["float", "weights alone", *learned]
