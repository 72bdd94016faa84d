"""A fixed file with the tables of other widths: it runs as the plain one, and gives the others' files."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from places import artifact
from torch import nn

from tqexport import CheckpointInfo, Scheme, TruncModel, prepare
from tqexport.artifacts.truncate import open_artifact, truncate_file
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.truncatable import plain_file, truncatable_onnx
from tqexport.errors import InputError
from tqexport.runtime import SwitchableModel
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)


@pytest.fixture(scope="module")
def onnx_files(exported_once):
    """Plain files, and files with tables, of every width."""
    plain = {bits: artifact(exported_once, "onnx", bits) for bits in WIDTHS}
    return plain, dict(truncatable_onnx(plain.items(), WIDTHS))


# Cutting


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_onnx_file_of_any_width_gives_every_other(onnx_files, bits):
    plain, truncatable = onnx_files
    for other in WIDTHS:
        assert truncate_file(truncatable[bits], other) == plain[other]


def test_a_width_that_the_file_lacks_is_refused(onnx_files):
    for bits in (0, 9):
        with pytest.raises(
            InputError, match=f"holds 1, 2, 3, 4, 5, 6, 7, 8 bits, so it cannot be truncated to {bits}$"
        ):
            truncate_file(onnx_files[1][4], bits)


# The file itself


def test_the_onnx_graph_is_that_of_the_plain_file(onnx_files, digits_samples):
    plain, truncatable = onnx_files
    assert plain_file(onnx.load_from_string(truncatable[4])).SerializeToString(deterministic=True) == plain[4]
    assert onnx.load_from_string(truncatable[4]).graph == onnx.load_from_string(plain[4]).graph
    x = digits_samples.inputs[:64]
    assert np.array_equal(run_file(truncatable[4], x).output, run_file(plain[4], x).output)


def test_onnxruntime_has_nothing_to_say_about_it(onnx_files, capfd):
    ort.InferenceSession(onnx_files[1][4])
    assert capfd.readouterr().err == ""


def test_the_tables_cost_no_second_copy_of_codes_or_float_layers(onnx_files):
    initializers = zip(*(onnx.load_from_string(each).graph.initializer for each in onnx_files[0].values()), strict=True)
    differing = sum(len(every[0].raw_data) for every in initializers if len({each.raw_data for each in every}) > 1)
    assert differing > 4_000
    assert len(onnx_files[1][8]) < len(onnx_files[0][8]) + 7 * differing * 4 / 3 + 8_000


def test_a_file_with_tables_passes_verification_as_the_plain_one_does(digits, digits_samples, onnx_files):
    x = digits_samples.inputs[:32]
    for bits in (2, 8):
        verdict = compare(digits, bits, run_file(onnx_files[1][bits], x), x)
        assert verdict.passed, verdict.problems
        assert verdict.codes == 76_288


def test_damage_in_the_tables_is_found(onnx_files):
    model = onnx.load_from_string(onnx_files[1][4])
    entry = next(entry for entry in model.metadata_props if entry.key == "tqexport.tables")
    entry.value = ("A" if entry.value[0] != "A" else "B") + entry.value[1:]
    with pytest.raises(InputError, match="was changed or damaged since its export"):
        truncate_file(model.SerializeToString(), 1)
    entry.value = "no base64"
    with pytest.raises(InputError, match="was changed or damaged since its export"):
        truncate_file(model.SerializeToString(), 1)


def test_an_application_can_switch_with_it(onnx_files, digits_samples):
    x = digits_samples.inputs[:3]
    model = SwitchableModel(onnx_files[1][4])
    assert (model.bits, model.widths) == (4, tuple(WIDTHS))
    for bits in (4, 8, 1):
        model.bits = bits
        assert np.array_equal(model.run(x), run_file(onnx_files[0][bits], x).output)


# What is refused


def test_what_cannot_be_cut_is_refused():
    scheme = Scheme("dorefa")
    network = prepare(nn.Sequential(nn.Linear(4, 3)), (2, 8), scheme=scheme, float_layers=[])
    model = TruncModel(network.eval(), CheckpointInfo("test", {}, (4,), (2, 8), scheme))
    with pytest.raises(InputError, match=r"dorefa cannot switch to other widths: its codes must not be shifted"):
        dict(truncatable_onnx(export_onnx(model, (2, 8)), (8,)))
    network = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), (2, 8), float_layers=[])
    info = CheckpointInfo("test", {}, (4,), (2, 8), Scheme(), (2, 32))
    model = TruncModel(network.eval(), info)
    with pytest.raises(InputError, match="do not share one graph"):
        dict(truncatable_onnx(export_onnx(model, (2, 8)), (8,)))
    single = TruncModel(network.eval(), dataclasses.replace(info, widths=(8,), activation_bits=(8,)))
    with pytest.raises(Exception, match="needs at least two widths"):
        dict(truncatable_onnx(export_onnx(single, (8,)), (8,)))


def test_a_file_says_what_can_be_cut(onnx_files):
    held = open_artifact(onnx_files[1][4])
    assert (held.widths, held.own, held.holds_several) == (tuple(WIDTHS), 4, True)
    plain = open_artifact(onnx_files[0][4])
    assert (plain.widths, plain.own, plain.holds_several) == ((4,), 4, False)
    assert held.facts_at(4) == plain.facts
