"""verify compares parameters: what was changed is named whatever the samples, what was rewritten passes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from commands import run
from damage import LAYER, changed_onnx, replace_artifact, scaled_onnx, scaled_tflite
from judging import KINDS, Judge, Kind, rewrites_of
from places import artifact

from tqexport.backends import BACKENDS
from tqexport.backends.parameters import Parameters
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import HostError
from tqexport.integer.names import INTEGER, is_integer
from tqexport.verification.jobs import Job

CHANGED = 6  # files of each kind; tests/torture.py tries as many as one likes


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(tmp_path_factory.mktemp("judge"), samples=4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_changes_the_meaning_never_passes(judge, kind):
    shares_most = kind.packed or (is_integer(kind.kernel) and kind.kernel != INTEGER)  # all but the form of the weights
    count = CHANGED // 2 if shares_most else CHANGED
    outcomes = [judge.changed(kind, seed) for seed in range(count)]
    effective = [outcome for outcome in outcomes if outcome.effect]
    assert effective
    assert [outcome for outcome in effective if outcome.passed] == []


@pytest.mark.parametrize("seed", [103010, 103036])  # an operator reads what stands before a rounding
def test_a_rounding_that_was_left_out_fails_where_the_kernel_rounds_itself(judge, seed):
    outcome = judge.changed(Kind("tflite", kernel="dynamic"), seed)
    assert outcome.effect
    assert not outcome.passed
    assert any("the structure" in problem for problem in outcome.problems)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_keeps_the_meaning_passes(judge, kind):
    outcomes = [judge.rewritten(kind, seed) for seed in range(len(rewrites_of(kind)))]
    assert [outcome for outcome in outcomes if not outcome.passed or outcome.compared != "equal"] == []


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("backend", "scaled"), [("onnx", scaled_onnx), ("tflite", scaled_tflite)])
def test_a_scale_that_no_sample_shows_is_named_with_both_values(judge, backend, scaled, bits):
    found = compare(judge, backend, bits, scaled(judge.right(Kind(backend), bits), 1 + 1e-6))
    (text,) = found.differences.values()
    assert LAYER in text
    assert "where the checkpoint gives" in text


def test_a_bias_and_a_float_filter_are_named(judge):
    content = judge.right(Kind("onnx"), 4)
    for name in ("fc.bias", "conv.weight", "bn.running_var"):
        found = compare(judge, "onnx", 4, changed_onnx(content, name, lambda value: value * np.float32(1.01)))
        assert list(found.differences) == [name]
    flat = FlatModel(judge.right(Kind("tflite"), 4))
    (last,) = [op for op in flat.graph.operators if flat.operator_name(op) == "FULLY_CONNECTED"]
    flat.set_constant(int(last.inputs[2]), flat.constant(int(last.inputs[2])) * np.float32(1.01))
    assert len(compare(judge, "tflite", 4, flat.pack()).differences) == 1


def test_what_the_file_says_of_itself_is_compared(judge):
    model = onnx.load_from_string(judge.right(Kind("onnx"), 4))
    next(entry for entry in model.metadata_props if entry.key == "tqexport.architecture").value = "another"
    assert "another" in compare(judge, "onnx", 4, model.SerializeToString()).differences["architecture"]


def test_a_structure_of_another_make_is_judged_without_roundings(judge):
    model = onnx.load_from_string(judge.right(Kind("onnx"), 4))
    model.graph.node[-1].output[0] = "before"
    for factor, passes in ((1.0, True), (1.001, False)):
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        changed.graph.initializer.append(onnx.numpy_helper.from_array(np.full(10, factor, np.float32), "factor"))
        changed.graph.node.append(onnx.helper.make_node("Mul", ["before", "factor"], ["output"]))
        found = compare(judge, "onnx", 4, changed.SerializeToString())
        assert found.not_compared
        assert (not found.differences) == passes


@pytest.mark.parametrize("place", ["layers.2.act0/Clip", "layers.2.bn0/BatchNormalization", "layers.2.bn1/"])
@pytest.mark.parametrize("kernel", ["exact", "exact-packed"])
def test_a_ten_thousandth_more_behind_one_operator_fails(judge, place, kernel):
    """It moves the outputs by as little as 2e-5, and no activation of 32 samples over a boundary."""
    model = onnx.load_from_string(judge.right(Kind("onnx", kernel), 4))
    position, node = next((i, each) for i, each in enumerate(model.graph.node) if each.name.startswith(place))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.0001, np.float32), "factor"))
    name, node.output[0] = node.output[0], "before"
    model.graph.node.insert(position + 1, onnx.helper.make_node("Mul", ["before", "factor"], [name], "scaled"))
    found = judge.fresh(Kind("onnx", kernel)).compare("onnx", kernel, model.SerializeToString(), 4, switched=False)
    assert "which float rounding explains up to" in found.differences["the outputs"]


def test_the_command_names_the_parameter(exported):
    replace_artifact(exported / "out", "ckpt-w4.onnx", lambda content: scaled_onnx(content, 1 + 1e-6))
    done = run("verify", "out", "--bits", "4", "--runtime", "onnxruntime", "--samples", "2", cwd=exported)
    assert done.returncode == 1
    assert f"{LAYER}.weight.scale: it is " in " ".join(done.stdout.split())


def test_without_a_converter_the_report_says_that_parameters_were_not_compared(exported, monkeypatch):
    def nothing(self, kernel="exact"):
        raise HostError("conversion to TFLite needs onnx2tf, which is not installed")

    monkeypatch.setattr(type(BACKENDS["tflite"]), "check_environment", nothing)
    done = run("verify", "out", "--bits", "4", "--runtime", "litert", "--samples", "2", cwd=exported)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters not compared: no fresh export could be made, because conversion" in " ".join(done.stdout.split())


def compare(judge: Judge, backend: str, bits: int, content: bytes):
    return judge.fresh(Kind(backend)).compare(backend, "exact", content, bits, switched=False)


def test_the_exported_file_is_what_a_fresh_export_gives(judge, exported_once):
    for backend in ("onnx", "tflite"):
        assert artifact(exported_once, backend, 4) == judge.right(Kind(backend), 4)


@pytest.mark.parametrize("kernel", ["exact", "integer"])
@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_the_outputs_are_those_of_the_file_that_is_given(judge, backend, kernel):
    """Whatever the file computes in which values are looked at, because they have names there that are known."""
    kind = Kind(backend, kernel)
    right = judge.right(kind, 4)
    wrong = judge.right(kind, 2)

    class Trusting(Job):
        def parameters(self, fresh):  # noqa: ARG002
            return Parameters(right)

    assert all(each.passed for each in judge.checked(kind, 4, right, make=Trusting))
    for each in judge.checked(kind, 4, wrong, make=Trusting):
        assert not each.passed
        assert "the outputs" in each.problems[0] or "differ between" in each.problems[0]
