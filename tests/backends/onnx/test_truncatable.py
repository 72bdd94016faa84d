"""A fixed file with the tables of other widths: it runs as the plain one, and gives the others' files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from networks import randomize_
from test_cli import files, run
from torch import nn

from tqexport import CheckpointInfo, Scheme, TruncModel, prepare
from tqexport.artifacts.truncate import open_artifact, truncate_file
from tqexport.backends import run_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.truncatable import plain_file, truncatable_onnx
from tqexport.backends.tflite.file import unpack
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.errors import InputError
from tqexport.runtime import SwitchableModel
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)


@pytest.fixture(scope="module")
def onnx_files(exported_once):
    """Plain files, and files with tables, of every width."""
    plain = {bits: (exported_once / "out" / f"ckpt-w{bits}.onnx").read_bytes() for bits in WIDTHS}
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


def test_cutting_loads_no_framework_and_no_runtime(onnx_files, tmp_path):
    (tmp_path / "w5.onnx").write_bytes(onnx_files[1][5])
    program = (
        "import sys, pathlib; from tqexport.artifacts.truncate import truncate_file\n"
        "pathlib.Path('w3.onnx').write_bytes(truncate_file(pathlib.Path('w5.onnx'), 3))\n"
        "print(*sorted({'torch', 'tensorflow', 'onnxruntime', 'onnxscript', 'onnx2tf', 'ai_edge_litert.interpreter'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert (tmp_path / "w3.onnx").read_bytes() == onnx_files[0][3]


# The file itself


def test_the_onnx_graph_is_that_of_the_plain_file(onnx_files, digits_samples):
    plain, truncatable = onnx_files
    assert plain_file(onnx.load_from_string(truncatable[4])).SerializeToString(deterministic=True) == plain[4]
    assert onnx.load_from_string(truncatable[4]).graph == onnx.load_from_string(plain[4]).graph
    x = digits_samples.inputs[:64]
    assert np.array_equal(run_file(truncatable[4], x).outputs, run_file(plain[4], x).outputs)


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
        assert np.array_equal(model.run(x), run_file(onnx_files[0][bits], x).outputs)


# Layers of every kind


class FloatLayers(nn.Module):
    """Float layers with each width's own BatchNorms, in the middle and behind activations; one layer is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm0 = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.shortcut, self.norm1 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.norm3, self.norm4 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.act0, self.act1, self.act2, self.act3 = (nn.ReLU() for _ in range(4))
        self.hidden, self.act4, self.last = nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5)

    def forward(self, x):
        x = self.act0(self.norm0(self.first(x)))
        x = self.act1(self.norm2(self.conv(x)) + self.norm1(self.shortcut(x)))
        x = self.act2(self.norm3(self.twice(x)))
        x = self.act3(self.norm4(self.twice(x)))
        return self.last(self.act4(self.hidden(x.mean((2, 3)))))


def all_kinds(network, shape, widths, scheme=Scheme(), activation_bits=(), kernel="exact"):
    info = CheckpointInfo("test", {}, shape, tuple(widths), scheme, activation_bits)
    model = TruncModel(network.eval(), info)
    exported = dict(export_onnx(model, tuple(widths)))
    content, plain = convert_to_runtime_tflite([onnx.load_from_string(each) for each in exported.values()], kernel)
    return model, exported, content, plain


@pytest.mark.parametrize("more", [[], ["twice"]])
def test_float_layers_are_stored_once_and_come_back_bit_for_bit(more):
    network = prepare(FloatLayers(), (1, 4, 8), float_layers=["first", "shortcut", "last", *more])
    network = randomize_(network, 7)
    if more:
        network.norm1.bn_dict["4"].weight.data[3] = 0  # a silenced channel says nothing about its weights
    model, exported, content, plain = all_kinds(network, (2, 7, 6), (1, 4, 8))
    held = unpack(content)[0]
    weights = [tensor.buffer for graph in held.subgraphs for tensor in graph.tensors if tensor.name.endswith(b".float")]
    assert len(weights) == 3 + 3 + 2 + 6 * len(more)  # at 1 bit there is nothing to divide the classifier by
    assert len(set(weights)) == 3 + len(more)
    for bits, fixed in plain.items():
        assert truncate_file(content, bits) == fixed
    files = dict(truncatable_onnx(exported.items(), (4,)))
    assert all(truncate_file(files[4], bits) == exported[bits] for bits in exported)
    x = np.random.default_rng(0).random((4, 2, 7, 6), np.float32)
    for bits in plain:
        run = run_file(content, x, bits)
        found = compare(model, bits, run, x)
        assert found.passed, (bits, found.problems)


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


# The commands


def test_the_commands(exported):
    fixed = {path.name: path.read_bytes() for path in (exported / "out").iterdir()}
    done = run("onnx", "ckpt.pt", "--bits", "4", "--truncatable", "-o", "new", cwd=exported)
    assert done.returncode == 0, done.stderr
    assert "can be truncated to 1, 2, 3, 5, 6, 7, 8" in done.stdout
    manifest = json.loads((exported / "new" / "tqexport.json").read_text())
    assert [(e["file"], e["widths"], e["truncatable_to"]) for e in manifest["artifacts"]] == [
        ("ckpt-w4.onnx", [4], [1, 2, 3, 5, 6, 7, 8]),
    ]
    # the tables of the ONNX file must not be taken for facts of the TFLite file made from it
    assert run("tflite", "new", "--bits", "4", "-o", "plain", cwd=exported).returncode == 0
    assert (exported / "plain" / "ckpt-w4.tflite").read_bytes() == fixed["ckpt-w4.tflite"]

    before = {path.name: path.read_bytes() for path in (exported / "new").iterdir()}
    assert run("truncate", "new/ckpt-w4.onnx", cwd=exported).returncode == 0
    added = {path.name: path.read_bytes() for path in (exported / "new").iterdir() if path.name not in before}
    assert sorted(added) == [f"ckpt-w{bits}.onnx" for bits in (1, 2, 3, 5, 6, 7, 8)]
    assert all(content == fixed[name] for name, content in added.items())

    refused = run("truncate", "new/ckpt-w4.onnx", "--bits", "4", cwd=exported)
    assert (refused.returncode, "is another file already" in refused.stderr) == (2, True)
    assert (exported / "new" / "ckpt-w4.onnx").read_bytes() == before["ckpt-w4.onnx"]
    refused = run("truncate", "out/ckpt-w4.onnx", "--bits", "2", cwd=exported)
    assert (refused.returncode, "--truncatable" in refused.stderr) == (3, True)
    refused = run("onnx", "ckpt.pt", "--bits", "runtime", "--truncatable", cwd=exported)
    assert (refused.returncode, "leave --truncatable out" in refused.stderr) == (2, True)


def test_tflite_files_of_one_width_hold_no_other_and_the_refusal_says_what_to_do(exported):
    before = files(exported)
    refused = run("tflite", "out", "--bits", "4", "--truncatable", "-o", "new", cwd=exported)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--bits runtime" in refused.stderr
    assert "ONNX file made with --truncatable" in refused.stderr
    assert files(exported) == before


def test_a_file_says_what_can_be_cut(onnx_files):
    held = open_artifact(onnx_files[1][4])
    assert (held.widths, held.own, held.holds_several) == (tuple(WIDTHS), 4, True)
    plain = open_artifact(onnx_files[0][4])
    assert (plain.widths, plain.own, plain.holds_several) == ((4,), 4, False)
    assert held.facts_at(4) == plain.facts
