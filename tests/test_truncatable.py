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
from tqexport.backends import run_file
from test_cli import files, run
from test_tflite_export import Layers
from torch import nn
from tqexport.backends.tflite.truncatable import truncatable_tflite

from tqexport import CheckpointInfo, Scheme, TruncModel, prepare
from tqexport.artifacts.truncate import artifact_widths, truncate_file
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.file import read_metadata
from tqexport.backends.onnx.truncatable import truncatable_onnx, without_tables
from tqexport.backends.tflite.file import TABLES_NAME, unpack
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.runtime_file import merge_tflite
from tqexport.errors import InputError
from tqexport.runtime import SwitchableModel
from tqexport.verification.comparison import compare

WIDTHS = range(1, 9)


@pytest.fixture(scope="module")
def onnx_files(exported_once):
    """Plain files, and files with tables, of every width."""
    plain = {bits: (exported_once / "out" / f"ckpt-w{bits}.onnx").read_bytes() for bits in WIDTHS}
    return plain, dict(truncatable_onnx(plain.items(), WIDTHS))


@pytest.fixture(scope="module")
def tflite_files(exported_once):
    models = [onnx.load(exported_once / "out" / f"ckpt-w{bits}.onnx") for bits in WIDTHS]
    content, plain = merge_tflite(models)
    return plain, truncatable_tflite(content, plain, WIDTHS)


# Cutting


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_onnx_file_of_any_width_gives_every_other(onnx_files, bits):
    plain, truncatable = onnx_files
    for other in WIDTHS:
        assert truncate_file(truncatable[bits], other) == plain[other]


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_a_tflite_file_gives_the_narrower_ones(tflite_files, exported_once, bits):
    plain, truncatable = tflite_files
    for other in range(1, bits + 1):
        cut = truncate_file(truncatable[bits], other)
        assert cut == plain[other] == (exported_once / "out" / f"ckpt-w{other}.tflite").read_bytes()


def test_a_width_whose_bits_are_gone_is_refused(onnx_files, tflite_files):
    with pytest.raises(InputError, match=r"holds 1, 2, 3, 4 bits.*truncated to 6; its codes were cut to 4 bits"):
        truncate_file(tflite_files[1][4], 6)
    with pytest.raises(InputError, match=r"holds 1, 2, 3, 4 bits, so it cannot be truncated to 9$"):
        truncate_file(tflite_files[1][4], 9)
    with pytest.raises(InputError, match="holds 1, 2, 3, 4, 5, 6, 7, 8 bits, so it cannot be truncated to 0"):
        truncate_file(onnx_files[1][4], 0)
    assert tflite_files[1][1] == tflite_files[0][1]
    with pytest.raises(InputError, match=r"holds one width only \(1 bit\).*--truncatable.*--bits runtime"):
        truncate_file(tflite_files[1][1], 1)


def test_cutting_loads_no_framework_and_no_runtime(onnx_files, tflite_files, tmp_path):
    (tmp_path / "w5.onnx").write_bytes(onnx_files[1][5])
    (tmp_path / "w5.tflite").write_bytes(tflite_files[1][5])
    program = (
        "import sys, pathlib; from tqexport.artifacts.truncate import truncate_file\n"
        "for kind in ('onnx', 'tflite'):\n"
        "    pathlib.Path(f'w3.{kind}').write_bytes(truncate_file(pathlib.Path(f'w5.{kind}'), 3))\n"
        "print(*sorted({'torch', 'tensorflow', 'onnxruntime', 'onnxscript', 'onnx2tf', 'ai_edge_litert.interpreter'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert (tmp_path / "w3.onnx").read_bytes() == onnx_files[0][3]
    assert (tmp_path / "w3.tflite").read_bytes() == tflite_files[0][3]


# The file itself


def test_the_onnx_graph_is_that_of_the_plain_file(onnx_files, digits_samples):
    plain, truncatable = onnx_files
    assert without_tables(onnx.load_from_string(truncatable[4])).SerializeToString(deterministic=True) == plain[4]
    assert onnx.load_from_string(truncatable[4]).graph == onnx.load_from_string(plain[4]).graph
    x = digits_samples.inputs[:64]
    assert np.array_equal(run_file(truncatable[4], x).outputs, run_file(plain[4], x).outputs)


def test_onnxruntime_has_nothing_to_say_about_it(onnx_files, capfd):
    ort.InferenceSession(onnx_files[1][4])
    assert capfd.readouterr().err == ""


def test_the_tflite_graph_is_that_of_the_plain_file(tflite_files, digits_samples):
    plain, truncatable = (FlatModel(files[4]) for files in tflite_files)
    plain.set_metadata({})
    truncatable.set_metadata({})
    assert truncatable.pack() == plain.pack()
    x = digits_samples.inputs[:16]
    assert np.array_equal(run_file(tflite_files[1][4], x).outputs, run_file(tflite_files[0][4], x).outputs)


def test_the_tables_cost_no_second_copy_of_codes_or_float_layers(onnx_files, tflite_files):
    initializers = zip(*(onnx.load_from_string(each).graph.initializer for each in onnx_files[0].values()), strict=True)
    differing = sum(len(every[0].raw_data) for every in initializers if len({each.raw_data for each in every}) > 1)
    assert differing > 4_000
    assert len(onnx_files[1][8]) < len(onnx_files[0][8]) + 7 * differing * 4 / 3 + 8_000
    scales_offsets_and_biases = 3 * 4 * 368  # of 368 channels
    for bits in range(2, 9):
        tables = FlatModel(tflite_files[1][bits]).metadata(TABLES_NAME)
        assert len(tables) < bits * scales_offsets_and_biases + 34_000


def test_a_file_with_tables_passes_verification_as_the_plain_one_does(digits, digits_samples, onnx_files, tflite_files):
    x = digits_samples.inputs[:32]
    for bits in (2, 8):
        for found in (run_file(onnx_files[1][bits], x), run_file(tflite_files[1][bits], x)):
            verdict = compare(digits, bits, found, x)
            assert verdict.passed, verdict.problems
            assert verdict.codes == 76_288


def test_damage_in_the_tables_is_found(onnx_files, tflite_files):
    model = onnx.load_from_string(onnx_files[1][4])
    entry = next(entry for entry in model.metadata_props if entry.key == "tqexport.tables")
    entry.value = ("A" if entry.value[0] != "A" else "B") + entry.value[1:]
    with pytest.raises(InputError, match="was changed or damaged since its export"):
        truncate_file(model.SerializeToString(), 1)
    entry.value = "no base64"
    with pytest.raises(InputError, match="was changed or damaged since its export"):
        truncate_file(model.SerializeToString(), 1)

    content = tflite_files[1][8]
    start = content.index(FlatModel(content).metadata(TABLES_NAME))
    for position in (0, 4, 400, 9_000, 30_000):
        changed = bytearray(content)
        changed[start + position] ^= 0x40
        try:
            assert truncate_file(bytes(changed), 2) == tflite_files[0][2]  # a byte that plays no part
        except InputError as error:
            assert "changed or damaged" in str(error) or "not a valid TFLite file" in str(error)  # noqa: PT017
    codes = next(bytes(b.data) for b in unpack(content)[0].buffers if b.data is not None and len(b.data) > 36_000)
    changed = content.replace(codes, codes[:9] + bytes([codes[9] ^ 0x80]) + codes[10:], 1)
    with pytest.raises(InputError, match="was changed or damaged since its export"):
        truncate_file(changed, 1)


def test_an_application_can_switch_with_it(onnx_files, tflite_files, digits_samples):
    x = digits_samples.inputs[:3]
    model = SwitchableModel(onnx_files[1][4])
    assert (model.bits, model.widths) == (4, tuple(WIDTHS))
    for bits in (4, 8, 1):
        model.bits = bits
        assert np.array_equal(model.run(x), run_file(onnx_files[0][bits], x).outputs)
    model = SwitchableModel(tflite_files[1][4])
    assert (model.bits, model.widths) == (4, (1, 2, 3, 4))
    for bits in (4, 2):
        model.bits = bits
        assert np.array_equal(model.run(np.moveaxis(x, 1, -1)), run_file(tflite_files[0][bits], x).outputs)
    with pytest.raises(InputError, match="cannot run at 8"):
        model.bits = 8


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
    content, plain = merge_tflite([onnx.load_from_string(each) for each in exported.values()], kernel)
    return model, exported, content, plain


def assert_cuttable(content, plain):
    for bits, file in truncatable_tflite(content, plain, plain).items():
        for other in plain:
            if other <= bits and bits > min(plain):
                assert truncate_file(file, other) == plain[other], (bits, other)


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
    assert_cuttable(content, plain)
    files = dict(truncatable_onnx(exported.items(), (4,)))
    assert all(truncate_file(files[4], bits) == exported[bits] for bits in exported)
    x = np.random.default_rng(0).random((4, 2, 7, 6), np.float32)
    for bits in plain:
        run = run_file(content, x, bits)
        found = compare(model, bits, run, x)
        assert found.passed, (bits, found.problems)


@pytest.mark.parametrize(
    ("scheme", "activation_bits", "kernel"),
    [
        (Scheme(), (), "dynamic"),
        (Scheme(bias_correction=True), (1, 4, 32), "exact"),
        (Scheme(bias_correction=True), (), "dynamic"),
    ],
)
def test_layer_kinds_kernels_and_activation_kinds(scheme, activation_bits, kernel):
    network = randomize_(prepare(Layers(), (1, 4, 8), scheme=scheme), 3)
    network.norm2.bn_dict["8"].weight.data[3] = 0
    _, _, content, plain = all_kinds(network, (3, 9, 10), (1, 4, 8), scheme, activation_bits, kernel)
    assert_cuttable(content, plain)


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
    done = run("tflite", "new", "--bits", "1,4", "--truncatable", cwd=exported)
    assert done.returncode == 0, done.stderr
    assert "nothing can be cut from the TFLite file of the narrowest width, 1" in done.stderr
    manifest = json.loads((exported / "new" / "tqexport.json").read_text())
    assert [(e["file"], e["widths"], e["truncatable_to"]) for e in manifest["artifacts"]] == [
        ("ckpt-w4.onnx", [4], [1, 2, 3, 5, 6, 7, 8]),
        ("ckpt-w1.tflite", [1], []),
        ("ckpt-w4.tflite", [4], [1, 2, 3]),
    ]
    # the tables of the ONNX file must not be taken for facts of the TFLite file made from it
    assert run("tflite", "new", "--bits", "4", "-o", "plain", cwd=exported).returncode == 0
    assert (exported / "plain" / "ckpt-w4.tflite").read_bytes() == fixed["ckpt-w4.tflite"]

    before = {path.name: path.read_bytes() for path in (exported / "new").iterdir()}
    assert run("truncate", "new/ckpt-w4.onnx", cwd=exported).returncode == 0
    assert run("truncate", "new/ckpt-w4.tflite", "--bits", "1,2,4", "-o", "cut", cwd=exported).returncode == 0
    assert files(exported / "cut") == ["ckpt-w1.tflite", "ckpt-w2.tflite", "ckpt-w4.tflite"]
    added = {path.name: path.read_bytes() for path in (exported / "new").iterdir() if path.name not in before}
    assert sorted(added) == [f"ckpt-w{bits}.onnx" for bits in (1, 2, 3, 5, 6, 7, 8)]
    for name, content in (*added.items(), *((p.name, p.read_bytes()) for p in (exported / "cut").iterdir())):
        assert content == fixed[name]

    refused = run("truncate", "new/ckpt-w4.onnx", "--bits", "4", cwd=exported)
    assert (refused.returncode, "is another file already" in refused.stderr) == (2, True)
    assert (exported / "new" / "ckpt-w4.onnx").read_bytes() == before["ckpt-w4.onnx"]
    refused = run("truncate", "new/ckpt-w4.tflite", "--bits", "6", cwd=exported)
    assert (refused.returncode, "cut to 4 bits" in refused.stderr) == (3, True)
    refused = run("truncate", "out/ckpt-w4.onnx", "--bits", "2", cwd=exported)
    assert (refused.returncode, "--truncatable" in refused.stderr) == (3, True)
    refused = run("onnx", "ckpt.pt", "--bits", "runtime", "--truncatable", cwd=exported)
    assert (refused.returncode, "leave --truncatable out" in refused.stderr) == (2, True)


def test_metadata_says_what_can_be_cut(onnx_files, tflite_files):
    facts = read_metadata(onnx.load_from_string(onnx_files[1][4]))
    assert (facts["width"], facts["truncatable_to"]) == (4, list(WIDTHS))
    assert unpack(tflite_files[1][4])[1]["truncatable_to"] == [1, 2, 3, 4]
    held = artifact_widths(tflite_files[1][4])
    assert (held.widths, held.own, held.truncatable) == ((1, 2, 3, 4), 4, True)
