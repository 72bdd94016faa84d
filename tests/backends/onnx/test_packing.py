"""Packed ONNX files: they compute what the plain ones do and cost what their width costs; changed ones are found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from commands import run
from damage import changed_onnx, replace_artifact
from integer_runs import integer_verdicts
from networks import model_of, randomize_
from places import artifact, files
from torch import nn

from tqexport import Scheme, prepare
from tqexport.artifacts.project import open_project
from tqexport.artifacts.truncate import truncate_file
from tqexport.backends import BACKENDS, open_runner
from tqexport.backends.base import EXACT_PACKED
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.packing import pack_onnx
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.integer.names import PACKED
from tqexport.runtime import SwitchableModel

CODES = 76_288
LAYER = "layers.1.conv1.weight"


def odd_counts(widths, scheme=Scheme()):
    """Layers whose codes do not fill their last byte, one of them depthwise."""
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Conv2d(6, 41, 3), nn.Conv2d(41, 41, 3, groups=41), nn.Flatten(),
        nn.Linear(41 * 9, 9), nn.Linear(9, 3),
    )  # fmt: skip
    return model_of(randomize_(prepare(network, widths, scheme=scheme), 3), (2, 9, 9), widths, scheme)


def folded(content, folder):
    """The operators that are left when onnxruntime has loaded a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(content, options)
    return [node.op_type for node in onnx.load(folder / "loaded.onnx").graph.node]


@pytest.mark.parametrize(("bits", "stored"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_a_packed_file_computes_what_the_plain_one_does_at_the_size_of_its_width(
    exported_once, digits_samples, tmp_path, bits, stored
):
    plain = artifact(exported_once, "onnx", bits)
    packed, x = pack_onnx(plain), digits_samples.inputs[:50]
    assert abs(len(plain) - len(packed) - CODES * (8 - stored) // 8) < 2_500  # two nodes for each of eight layers
    for deployed in (True, False):
        one, other = (open_runner(content, deployed=deployed).run((x,)) for content in (plain, packed))
        assert np.array_equal(one.output, other.output)
        assert list(one.codes) == list(other.codes)
        assert all(np.array_equal(one.codes[name], other.codes[name]) for name in one.codes)
        assert all(np.array_equal(one.activations[name], other.activations[name]) for name in one.activations)
    assert folded(packed, tmp_path) == folded(plain, tmp_path)
    assert np.array_equal(SwitchableModel(packed).run(x), SwitchableModel(plain).run(x))


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("dorefa")], ids=["truncquant", "dorefa"])
def test_codes_that_do_not_fill_their_last_byte(scheme):
    model = odd_counts((1, 3), scheme)
    x = np.random.default_rng(0).normal(size=(3, 2, 9, 9)).astype(np.float32)
    for bits, plain in export_onnx(model, (1, 3)):
        packed = pack_onnx(plain)
        assert len(packed) < len(plain)
        assert np.array_equal(open_runner(packed).run_untouched((x,)), open_runner(plain).run_untouched((x,)))
        codes = [BACKENDS["onnx"].codes(content, bits) for content in (plain, packed)]
        assert codes[0].keys() == codes[1].keys()
        assert all(np.array_equal(codes[0][name][0], codes[1][name][0]) for name in codes[0])


def test_a_packed_file_is_the_same_however_it_is_made(exported_once, runtime_onnx, tmp_path):
    project = open_project(exported_once / "ckpt.pt", tmp_path, ReadOptions())
    (made,) = project.export("onnx", [2], EXACT_PACKED)
    assert made.file == "ckpt-w2-exact-packed.onnx"
    content = (tmp_path / made.file).read_bytes()
    assert content == truncate_file(runtime_onnx, 2, packed=True) == pack_onnx(artifact(exported_once, "onnx", 2))
    (tmp_path / "ckpt.onnx").write_bytes(runtime_onnx)
    done = run("truncate", "ckpt.onnx", "--bits", "2", "--packed", "--output", "cut", cwd=tmp_path)
    assert (done.returncode, files(tmp_path / "cut")) == (0, [made.file])
    assert (tmp_path / "cut" / made.file).read_bytes() == content
    done = run("inspect", made.file, cwd=tmp_path)
    assert "kernel exact-packed: weights that are smaller so are bytes with several codes in each" in done.stdout
    assert "64x64x3x3" in done.stdout


def test_the_command_names_a_changed_code(exported_once, tmp_path):
    shutil.copy(exported_once / "ckpt.pt", tmp_path / "ckpt.pt")
    name = "ckpt-w4-exact-packed.onnx"
    assert run("onnx", "ckpt.pt", "--bits", "4", "--kernel", "exact-packed", cwd=tmp_path).returncode == 0
    replace_artifact(tmp_path / "tqexport-out", name, lambda c: changed_onnx(c, f"{LAYER}.packed", one_bit))
    done = run("verify", "--samples", "2", "--runtime", "onnxruntime", "--json", cwd=tmp_path)
    assert done.returncode == 1
    verdicts = {check["artifact"]: check["passed"] for check in json.loads(done.stdout)["results"]}
    assert verdicts == {name: False, "ckpt-w4.onnx": True}
    assert f"FAIL: {name} at 4 bits differs from PyTorch, first in {LAYER}" in done.stderr


def one_bit(value):
    value.reshape(-1)[17] ^= 0x80
    return value


# The integer kernel


def integer_verdict(model, content, bits, inputs):
    (verdict,) = integer_verdicts(model, bits, content, inputs, PACKED).values()
    return verdict


@pytest.mark.parametrize("bits", [1, 3])
def test_packed_integer_files_pass_and_every_constant_that_is_changed_is_named(calibrated, held_out, bits, tmp_path):
    plain, packed = (integer_onnx(calibrated, bits, kernel) for kernel in ("integer", PACKED))
    assert len(packed) < len(plain) - CODES * 4 // 8 + 2_500
    assert folded(packed, tmp_path) == folded(plain, tmp_path)
    verdict = integer_verdict(calibrated, packed, bits, held_out[:8])
    assert verdict.passed, verdict.problems
    assert (verdict.codes, verdict.codes_wrong) == (CODES, 0)
    for name, change in (
        (f"{LAYER}.packed", one_bit),
        (f"{LAYER}.shift", lambda value: value - np.uint8(1)),
        (f"constant/places{1 if bits == 1 else 4}", lambda value: value[::-1]),
        ("fc.weight.unsigned", lambda value: -value),
    ):
        assert not integer_verdict(calibrated, changed_onnx(packed, name, change), bits, held_out[:8]).passed, name


# What is refused


def test_what_cannot_be_packed_is_refused_in_a_sentence(exported_once, runtime_onnx, tmp_path, calibrated):
    project = open_project(exported_once / "ckpt.pt", tmp_path / "out", ReadOptions())
    for widths in ([5], [2, 8]):
        with pytest.raises(UsageError, match="fit into a byte, so packing them saves nothing; name widths of 1 to 4"):
            list(project.export("onnx", widths, EXACT_PACKED))
    with pytest.raises(UsageError, match="tqexport truncate --packed cuts packed files"):
        project.export_runtime("onnx", EXACT_PACKED)
    with pytest.raises(UsageError, match="only files of --kernel exact keep tables of other widths"):
        list(project.export("onnx", [2], EXACT_PACKED, truncatable=True))
    assert not list((tmp_path / "out").glob("*"))
    packed = pack_onnx(artifact(exported_once, "onnx", 2))
    for content in (packed, runtime_onnx, integer_onnx(calibrated, 2, "integer-folded")):
        with pytest.raises(UsageError, match="not packed yet"):
            pack_onnx(content)
    with pytest.raises(InputError, match=r"holds one width only \(2 bits\), so no other width can be cut from it"):
        truncate_file(packed, 1)


def test_a_network_too_small_to_gain_is_refused():
    network = prepare(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 2)), (2, 4))
    ((_, content),) = export_onnx(model_of(randomize_(network, 0), (1, 8, 8), (2, 4)), (4,))
    with pytest.raises(ConversionError, match="no layer is smaller when its codes of 4 bits are packed; use --kernel"):
        pack_onnx(content)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{LAYER}.packed", lambda value: value[:-1]),
        ("constant/places2", lambda _: np.zeros(1 << 16, np.uint8)),
        ("constant/shape32x32x3x3", lambda value: value * 7),
        (f"{LAYER}.packed", lambda value: value.astype(np.int64)),
    ],
)
def test_damaged_bytes_are_a_refusal(exported_once, name, change):
    changed = changed_onnx(pack_onnx(artifact(exported_once, "onnx", 2)), name, change)
    with pytest.raises(InputError):
        BACKENDS["onnx"].codes(changed, 2)


def test_a_damaged_text_is_a_refusal(exported_once):
    content = artifact(exported_once, "onnx", 2)
    for text in (b"tqexport.width", b"layers.1.conv1.weight.shift"):
        with pytest.raises(InputError, match="is not a valid ONNX file"):
            BACKENDS["onnx"].facts(content.replace(text, text[:-1] + b"\xff"))
