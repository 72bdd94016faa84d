"""verify of files that are named beside their checkpoint: wherever they lie, and rewritten since their export."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
import pytest
from commands import run
from damage import changed_onnx, scaled_onnx
from networks import Attention, model_of, randomize_
from onnx import TensorProto, helper, numpy_helper
from places import DIGITS, DIGITS_INT, artifact
from torch import nn

from tqexport import load_checkpoint, prepare, save_checkpoint
from tqexport.backends import BACKENDS
from tqexport.backends.c import CBackend
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.verification.fresh import FreshExports
from tqexport.verification.jobs import Job
from tqexport.verification.run import check
from tqexport.verification.samples import noise
from tqexport.verification.trial import project_of


@pytest.fixture
def folder(exported_once, runtime_onnx, runtime_tflite, tmp_path):
    """A checkpoint without an export folder, and files that a tool rewrote."""
    shutil.copy(DIGITS, tmp_path / "ckpt.pt")
    (tmp_path / "simple.onnx").write_bytes(simplified(artifact(exported_once, "onnx", 4)))
    (tmp_path / "fixed.tflite").write_bytes(artifact(exported_once, "tflite", 2))
    (tmp_path / "every.onnx").write_bytes(simplified(runtime_onnx))
    (tmp_path / "every.tflite").write_bytes(runtime_tflite)
    return tmp_path


def simplified(content: bytes) -> bytes:
    """What onnxsim makes of a file: it folds the shift of every code away."""
    return onnxsim.simplify(onnx.load_from_string(content))[0].SerializeToString()


def test_files_of_every_format_and_width_pass(folder):
    names = ["simple.onnx", "fixed.tflite", "every.onnx", "every.tflite"]
    done = run("verify", "ckpt.pt", *names, "--bits", "2,4", "--samples", "4", "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(each["bits"], each["artifact"]) for each in results] == [
        (2, "every.onnx"), (2, "fixed.tflite"), (2, "every.tflite"), (4, "simple.onnx"), (4, "every.onnx"),
        (4, "every.tflite"),
    ]  # fmt: skip
    assert all(each["as_deployed"]["parameters"] == "equal" for each in results)
    assert not any(each["temporary"] for each in results)


class Recurrent(nn.Module):
    """An LSTM, whose weights onnxsim puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.steps, self.last = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.steps(self.first(x).relu())[0].relu()[:, -1])


class Hybrid(nn.Module):
    """Attention behind convolutions, whose BatchNorms onnxsim puts into their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.norm = nn.Conv1d(4, 6, 1), nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.attend = Attention()

    def forward(self, x):
        return self.attend(self.norm(self.middle(self.stem(x))).relu().transpose(1, 2))


@pytest.mark.parametrize(
    ("network", "layer", "sizes"),
    [
        (Attention, "last", (3, 8)),
        (Recurrent, "steps.weight_ih_l0", (1, 8, 32)),
        (Hybrid, "middle", (3, 6, 6)),
    ],
)
def test_files_of_another_structure_pass_with_the_floats_of_every_code(network, layer, sizes):
    model = model_of(randomize_(prepare(network(), (2, 8)), 5), (4, 6), (2, 8))
    project = project_of(model)
    fresh = FreshExports(project, {})
    content = simplified(fresh.fixed("onnx", "exact", 2))
    file = onnx.load_from_string(content)
    assert not any(node.op_type == "BitShift" for node in file.graph.node)
    weight, *_ = [each.name for each in file.graph.initializer if sorted(each.dims) == [*sizes]]
    damage = [lambda value: np.where(value == value.max(), value * np.float32(1 + 1e-5), value), lambda value: -value]
    for change in (None, *damage):
        job = Job(2, BACKENDS["onnx"], "exact", "file", changed_onnx(content, weight, change) if change else content)
        (checked,) = check(project, job, noise(4, model.info.signature), (), fresh)
        assert checked.deployed.parameters != "equal"
        assert checked.deployed.passed is checked.unoptimized.passed is (change is None), checked.deployed.problems
        assert (f"layer {layer} has no codes in the file" in checked.deployed.problems) is (change is not None)


def extended(content, folder):
    """What onnxruntime makes of a file at its level EXTENDED: operators of its own, with activations in them."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "extended.onnx")
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return (folder / "extended.onnx").read_bytes()


@pytest.mark.parametrize(("factor", "right"), [(1, True), (1 + 1e-5, False)])
def test_files_with_operators_of_onnxruntime_pass_with_the_floats_of_every_code(folder, exported_once, factor, right):
    content = extended(scaled_onnx(artifact(exported_once, "onnx", 4), factor), folder)
    assert "FusedConv" in {node.op_type for node in onnx.load_from_string(content).graph.node}
    done = run("verify", "ckpt.pt", "extended.onnx", "--samples", "4", cwd=folder)
    assert done.returncode == (0 if right else 1), done.stdout + done.stderr
    assert ("the verdict is of the samples" in " ".join(done.stdout.split())) is right
    assert ("layers.1.conv1 has no codes in the file" in " ".join(done.stdout.split())) is not right


def test_a_statement_has_the_hash_of_the_rewritten_file(folder):
    done = run("verify", "ckpt.pt", "simple.onnx", "--samples", "2", "--attest", "s.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ckpt.pt against simple.onnx" in done.stdout
    statement = json.loads((folder / "s.json").read_text())
    sha256 = hashlib.sha256((folder / "simple.onnx").read_bytes()).hexdigest()
    assert statement["subject"] == [{"name": "simple.onnx", "digest": {"sha256": sha256}}]
    assert statement["predicate"]["result"] == "PASSED"


def test_what_was_changed_besides_is_named(folder, exported_once):
    content = simplified(scaled_onnx(artifact(exported_once, "onnx", 4), 1 + 1e-5))
    (folder / "simple.onnx").write_bytes(content)
    done = run("verify", "ckpt.pt", "simple.onnx", "--samples", "2", cwd=folder)
    assert done.returncode == 1
    assert "layers.1.bn1/weight: " in done.stdout  # into which onnxsim folds the layer before
    assert "where the checkpoint gives" in " ".join(done.stdout.split())


def test_files_of_another_checkpoint_fail(folder):
    model = load_checkpoint(DIGITS)
    dict(model.module.named_parameters())["fc.bias"].data[0] += 1
    save_checkpoint(folder / "other.pt", model.module, model.info)
    for name, bits in (("simple.onnx", 4), ("fixed.tflite", 2), ("every.onnx", 3)):
        done = run("verify", "other.pt", name, "--bits", bits, "--samples", "2", cwd=folder)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "checkpoint sha256: the file says" in " ".join(done.stdout.split())


def test_integer_files_pass_rewritten_and_fail_changed(folder):
    model = load_checkpoint(DIGITS_INT)
    shutil.copy(DIGITS_INT, folder / "int.pt")
    (folder / "int.onnx").write_bytes(simplified(integer_onnx(model, 4)))
    ((_, source),) = CBackend().export(project_of(model), (4,))
    (folder / "int.c").write_bytes(source)
    done = run("verify", "int.pt", "int.onnx", "int.c", "--samples", "2", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    changed = changed_onnx(integer_onnx(model, 4), "fc.bias_integers", lambda value: value + np.int32(1))
    (folder / "int.onnx").write_bytes(simplified(changed))
    done = run("verify", "int.pt", "int.onnx", "--samples", "2", cwd=folder)
    assert done.returncode == 1
    assert "fc.bias" in done.stdout


def test_functions_of_a_file_are_refused_and_other_domains_are_other_operators(folder):
    """Both may compute anything under the name of an operator."""
    model = onnx.load(folder / "simple.onnx")
    opset = next(entry for entry in model.opset_import if not entry.domain)
    last = model.graph.node[-1]
    end, last.output[0] = last.output[0], "before"
    model.graph.node.append(helper.make_node("Identity", ["before"], [end], domain="theirs"))
    model.opset_import.append(helper.make_opsetid("theirs", 1))
    (folder / "domain.onnx").write_bytes(model.SerializeToString())
    done = run("verify", "ckpt.pt", "domain.onnx", "--samples", "2", cwd=folder)
    assert done.returncode == 3, done.stdout + done.stderr
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    model.functions.append(helper.make_function("theirs", "Identity", ["x"], ["y"], nodes, [opset]))
    (folder / "function.onnx").write_bytes(model.SerializeToString())
    done = run("verify", "ckpt.pt", "function.onnx", "--samples", "2", cwd=folder)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "defines functions of its own, such as Identity; inline them" in done.stderr


def test_what_runtimes_round_otherwise_is_not_folded(folder):
    """onnxruntime takes float64 to float16 by way of float32; 8,192 and a bit has another float16 so."""
    model = load_checkpoint(DIGITS_INT)
    shutil.copy(DIGITS_INT, folder / "int.pt")
    file = onnx.load_from_string(integer_onnx(model, 4))
    graph = file.graph
    (bias,) = (tensor for tensor in graph.initializer if tensor.name == "fc.bias_integers")
    value = numpy_helper.to_array(bias)
    added = np.zeros(len(value))
    added[3] = 8196 + 2.0**-20
    graph.initializer.remove(bias)
    graph.initializer.append(numpy_helper.from_array(value - added.astype(np.float16).astype(np.int32), "rest"))
    graph.initializer.append(numpy_helper.from_array(added, "added"))
    for node in (
        helper.make_node("Add", ["rest", "whole"], [bias.name]),
        helper.make_node("Cast", ["half"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Cast", ["added"], ["half"], to=TensorProto.FLOAT16),
    ):
        graph.node.insert(0, node)
    (folder / "half.onnx").write_bytes(file.SerializeToString())
    done = run("verify", "int.pt", "half.onnx", "--samples", "2", cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the structure: " in " ".join(done.stdout.split())


def without_metadata(folder):
    model = onnx.load(folder / "simple.onnx")
    del model.metadata_props[:]
    (folder / "bare.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("ckpt.pt simple.onnx --bits 5", 2, "simple.onnx has 4 bits, not 5; name others with --bits"),
        ("ckpt.pt simple.onnx --bits 4,5", 2, "no file has 5 bits"),
        ("ckpt.pt simple.onnx again/simple.onnx", 2, "simple.onnx and again/simple.onnx have one name"),
        ("ckpt.pt simple.onnx --report ckpt.pt", 2, "ckpt.pt is there and is no report of an earlier run"),
        ("ckpt.pt nothing.onnx", 3, "nothing.onnx cannot be read"),
        ("ckpt.pt bare.onnx", 3, "bare.onnx was not written by tqexport, or lost its metadata since"),
        ("ckpt.pt empty.tflite", 3, "empty.tflite is not a valid ONNX, TFLite or C file"),
        ("int.pt simple.onnx", 3, "simple.onnx is of the kernel exact, and no such ONNX file is made of int.pt"),
        ("ckpt.pt simple.onnx --runtime litert", 2, "none of the files to compare runs in litert"),
        ("ckpt.pt int.pt simple.onnx", 2, "int.pt does not end as a file to compare (.onnx, .tflite, .c)"),
        ("simple.onnx ckpt.pt", 2, "ckpt.pt does not end as a file to compare (.onnx, .tflite, .c)"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(folder, line, code, message):
    without_metadata(folder)
    shutil.copy(DIGITS_INT, folder / "int.pt")
    (folder / "empty.tflite").touch()
    done = run("verify", *line.split(), cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
