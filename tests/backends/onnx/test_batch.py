"""ONNX files of a fixed number of samples: right ones pass, wrong ones fail, and any number of samples runs in them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxsim
import pytest
from commands import run
from damage import changed_onnx, flip_a_bit
from networks import Attention, model_of, randomize_
from places import DIGITS, artifact
from torch import nn

from tqexport import TruncModel, prepare
from tqexport.backends.onnx import OnnxBackend
from tqexport.backends.onnx.export import export_onnx
from tqexport.errors import ConversionError
from tqexport.integer.names import FOLDED, INTEGER, PACKED, SYMMETRIC
from tqexport.runtime import SwitchableModel
from tqexport.verification.fresh import FreshExports
from tqexport.verification.jobs import Job
from tqexport.verification.run import check
from tqexport.verification.samples import noise
from tqexport.verification.trial import project_of

BATCH = 3
ONNX = OnnxBackend()
SAMPLES = 5  # more than a batch, and no whole number of them


class Recurrent(nn.Module):
    """Linear layers around an LSTM, whose inner values have the steps in front of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.steps, self.last = nn.Linear(6, 8), nn.LSTM(8, 8, proj_size=4), nn.Linear(4, 2)

    def forward(self, x):
        values, _ = self.steps(self.first(x).relu().transpose(0, 1))
        return self.last(values.relu()[-1])


def prepared(network: nn.Module) -> TruncModel:
    return model_of(randomize_(prepare(network, (2, 8)), 5), (4, 6), (2, 8))


def verdicts(model, content, bits, kernel="exact", *, run_time=False):
    """What verify says of a file in every runtime, as deployed and layer by layer."""
    job = Job(bits, ONNX, kernel, "file", content, run_time=run_time, batch=ONNX.batch(content))
    checked = check(
        project_of(model), job, noise(SAMPLES, model.info.signature), (), FreshExports(project_of(model), {})
    )
    return [verdict for each in checked for verdict in (each.deployed, each.unoptimized)]


def names_in(content):
    return [tensor.name for tensor in onnx.load_from_string(content).graph.initializer]


@pytest.mark.parametrize(("network", "batch"), [(Recurrent, BATCH), (Attention, 1)])
def test_right_files_pass_and_changed_ones_fail(network, batch):
    model = prepared(network())
    source = project_of(model)
    files = [(bits, content, False) for bits, content in ONNX.export(source, (2, 8), batch=batch)]
    run_time = ONNX.export_runtime(source, batch=batch)
    for bits, content, switched in (*files, (2, run_time, True)):
        graph = onnx.load_from_string(content).graph
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
        assert not {"Shape", "Range", "Size"} & {node.op_type for node in graph.node}
        for verdict in verdicts(model, content, bits, run_time=switched):
            assert verdict.passed, verdict.problems
            assert verdict.samples == SAMPLES
    codes = next(name for name in names_in(files[1][1]) if name.endswith(".codes"))
    wrong = changed_onnx(files[1][1], codes, flip_a_bit)
    assert not any(verdict.passed for verdict in verdicts(model, wrong, 8))
    for bits, content, _ in files:
        assert ONNX.cut(run_time, bits) == content


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class StepsInFront(Middle):
    def forward(self, x):
        return self.last(self.first(x)).transpose(0, 1)


class Dependent(Middle):
    def forward(self, x):
        x = self.first(x)
        return self.last(x - x.mean(0))


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (StepsInFront, "output has something else than its samples in front, as the steps of a sequence"),
        (Dependent, "output does not have every sample by itself"),
    ],
)
def test_networks_whose_samples_are_not_apart_are_refused(network, words, batch):
    with pytest.raises(ConversionError, match=f"{words}.* no file can take a fixed number of them at once"):
        list(export_onnx(prepared(network()), (2,), batch))


def test_shapes_are_numbers_that_other_programs_infer():
    ((_, content),) = export_onnx(prepared(Attention()), (2,), BATCH)
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), strict_mode=True, data_prop=True)
    shapes = {value.name: value.type.tensor_type.shape for value in inferred.graph.value_info}
    for node in inferred.graph.node:
        for name in node.output:
            assert name == "output" or all(size.HasField("dim_value") for size in shapes[name].dim)


def test_any_number_of_samples_runs(digits, digits_samples):
    ((_, free),) = export_onnx(digits, (4,))
    ((_, fixed),) = export_onnx(digits, (4,), BATCH)
    answers = [SwitchableModel(content).run(digits_samples.inputs[:SAMPLES]) for content in (free, fixed)]
    assert answers[1].shape == (SAMPLES, 10)
    assert np.allclose(*answers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", [INTEGER, PACKED, FOLDED, SYMMETRIC])
def test_integer_files(calibrated, symmetric, kernel):
    model = symmetric if kernel == SYMMETRIC else calibrated
    ((_, content),) = ONNX.export(project_of(model), (2,), kernel, BATCH)
    assert ONNX.batch(content) == BATCH
    assert all(verdict.passed for verdict in verdicts(model, content, 2, kernel))


@pytest.mark.parametrize(("change", "right"), [(1, True), (1.001, False)])
def test_files_whose_batch_a_tool_fixed_pass_and_changed_ones_fail(digits, change, right):
    ((_, free),) = export_onnx(digits, (8,))
    changed = changed_onnx(free, "fc.bias", lambda value: value * np.float32(change))
    fixed, _ = onnxsim.simplify(onnx.load_from_string(changed), overwrite_input_shapes={"input": [1, 1, 8, 8]})
    found = verdicts(digits, fixed.SerializeToString(), 8)
    assert [verdict.passed for verdict in found] == [right, right]
    assert all(verdict.parameters == "equal" for verdict in found) is right


def test_the_command_names_enters_and_verifies_them(tmp_path):
    shutil.copy(DIGITS, tmp_path / "ckpt.pt")
    done = run("onnx", "ckpt.pt", "--bits", "2", "--batch", BATCH, cwd=tmp_path)
    done = run("onnx", "ckpt.pt", "--bits", "4", "--batch", "1", "--truncatable", cwd=tmp_path)
    assert "ckpt-w4-batch1.onnx" in done.stdout
    done = run("verify", "--samples", "4", "--bits", "2,4", "--runtime", "onnxruntime", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(each["artifact"], each["runtime"]) for each in results] == [
        ("ckpt-w2-batch3.onnx", "onnxruntime batch 3"),
        ("ckpt-w4-batch1.onnx", "onnxruntime batch 1"),
    ]
    done = run("truncate", "tqexport-out/ckpt-w4-batch1.onnx", "--bits", "2", cwd=tmp_path)
    assert "ckpt-w2-batch1.onnx" in done.stdout, done.stderr
    done = run("inspect", "tqexport-out/ckpt-w2-batch3.onnx", cwd=tmp_path)
    assert "channels first, 3 samples at once" in done.stdout


def test_other_formats_are_made_from_files_of_any_number(exported_once, tmp_path):
    shutil.copy(DIGITS, tmp_path / "ckpt.pt")
    assert run("onnx", "ckpt.pt", "--bits", "4", "--batch", "2", cwd=tmp_path).returncode == 0
    assert run("tflite", "--bits", "4", cwd=tmp_path).returncode == 0
    made = (tmp_path / "tqexport-out" / "ckpt-w4.tflite").read_bytes()
    assert made == artifact(exported_once, "tflite", 4)


def test_a_batch_that_no_export_has_is_refused(digits, tmp_path):
    ((_, content),) = export_onnx(digits, (4,), BATCH)
    model = onnx.load_from_string(content)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 10**6
    (tmp_path / "large.onnx").write_bytes(model.SerializeToString())
    shutil.copy(DIGITS, tmp_path / "ckpt.pt")
    done = run("verify", "ckpt.pt", "large.onnx", cwd=tmp_path)
    assert done.returncode == 3
    assert "large.onnx takes 1,000,000 samples at once; an export takes 1 to 1,024" in done.stderr
