"""TFLite files with INT4 constants: they compute what the plain ones do at half the size; changed ones are found."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from commands import run
from networks import Layers, model_of, one_dimensional, randomize_, samples_for
from places import artifact

from tqexport import prepare
from tqexport.artifacts.project import open_project
from tqexport.artifacts.truncate import truncate_file
from tqexport.backends import BACKENDS, open_runner
from tqexport.backends.base import EXACT, EXACT_PACKED
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite import DYNAMIC, DYNAMIC_PACKED
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.half_bytes import pack_tflite
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import UsageError
from tqexport.verification.comparison import compare

CODES = 76_288


def int4_constants(content):
    """Names of the INT4 tensors."""
    flat = FlatModel(content)
    return {flat.name(i) for i, tensor in enumerate(flat.graph.tensors) if tensor.type == schema.TensorType.INT4}


def assert_equal(packed, plain, x):
    """To the last bit, with XNNPACK and without, with the same codes."""
    for deployed in (True, False):
        one, other = (open_runner(content, deployed=deployed).run((x,)) for content in (packed, plain))
        assert np.array_equal(one.output, other.output)
        assert one.codes.keys() == other.codes.keys()
        assert all(np.array_equal(one.codes[name], other.codes[name]) for name in one.codes)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_packed_file_equals_the_plain_one_and_passes(exported_once, digits, digits_samples, bits):
    plain, x = artifact(exported_once, "tflite", bits), digits_samples.inputs[:20]
    packed = pack_tflite(plain)
    assert abs(len(plain) - len(packed) - CODES // 2) < 200
    assert int4_constants(packed) == {f"{name}.codes" for name in BACKENDS["tflite"].codes(plain, bits)}
    assert_equal(packed, plain, x)
    verdict = compare(digits, bits, open_runner(packed).run((x,)), x, kernel=EXACT_PACKED)
    assert verdict.passed, verdict.problems
    assert (verdict.codes, verdict.codes_wrong) == (CODES, 0)


@pytest.mark.parametrize(
    ("network", "seed", "shape", "kernel"), [(Layers, 5, (3, 9, 10), EXACT), (one_dimensional, 6, (3, 14), DYNAMIC)]
)
def test_every_kind_of_filter_and_odd_counts(network, seed, shape, kernel):
    model = model_of(randomize_(prepare(network(), (1, 4, 8)), seed), shape)
    ((_, content),) = export_onnx(model, (1,))
    (plain,) = convert_to_tflite([onnx.load_from_string(content)], kernel)
    packed = pack_tflite(plain)
    flat = FlatModel(packed)
    assert any(np.prod(flat.shape(flat.find(name))) % 2 for name in int4_constants(packed)) or network is not Layers
    assert_equal(packed, plain, samples_for(model, 3))


def test_a_packed_file_is_the_same_however_it_is_made(exported_once, runtime_tflite, tmp_path):
    project = open_project(exported_once / "ckpt.pt", tmp_path, ReadOptions())
    (made,) = project.export("tflite", [2], EXACT_PACKED)
    (dynamic,) = project.export("tflite", [2], DYNAMIC_PACKED)
    assert (made.file, dynamic.file) == ("ckpt-w2-exact-packed.tflite", "ckpt-w2-dynamic-packed.tflite")
    content = (tmp_path / made.file).read_bytes()
    assert content == truncate_file(runtime_tflite, 2, packed=True)
    assert content == pack_tflite(artifact(exported_once, "tflite", 2))
    done = run("inspect", dynamic.file, cwd=tmp_path)
    assert "kernel dynamic-packed: weights are INT4, two in a byte" in done.stdout
    assert "64x64x3x3" in done.stdout


def test_what_does_not_fit_is_refused_in_a_sentence(exported_once, runtime_tflite, tmp_path):
    project = open_project(exported_once / "ckpt.pt", tmp_path / "out", ReadOptions())
    for kernel in (EXACT_PACKED, DYNAMIC_PACKED):
        for widths in ([4], [1, 8]):
            with pytest.raises(UsageError, match="do not fit INT4, which holds -8 to 7; name widths of 1 to 3"):
                list(project.export("tflite", widths, kernel))
        with pytest.raises(UsageError, match="tqexport truncate --packed cuts packed files"):
            project.export_runtime("tflite", kernel)
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(UsageError, match="do not fit INT4"):
        truncate_file(runtime_tflite, 4, packed=True)
    with pytest.raises(UsageError, match="not packed yet"):
        pack_tflite(pack_tflite(artifact(exported_once, "tflite", 2)))
