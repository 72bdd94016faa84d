"""verify --runtime web: onnxruntime-web in Node passes right files and fails wrong ones. Needs node and npm."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import run
from damage import changed_onnx, flip_a_bit, replace_artifact, scaled_onnx
from integer_networks import calibrated_case
from places import DIGITS_DATA, DIGITS_INT, artifact
from torch import nn

from tqexport import CheckpointInfo, InputInfo, TruncModel, load_checkpoint, prepare
from tqexport.backends import BACKENDS, open_runner
from tqexport.backends.onnx import web_session
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.integer_runtime import IntegerWebRuntime
from tqexport.backends.onnx.integer_runtime_file import runtime_integer_onnx
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.onnx.web_session import WebSession, check_web
from tqexport.errors import HostError, InputError
from tqexport.integer.build import integer_model
from tqexport.verification.comparison import compare
from tqexport.verification.integers import IntegerComparison

pytestmark = pytest.mark.package


@pytest.fixture(scope="module", autouse=True)
def installed():
    try:
        check_web()
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(exported, runtime_files):
    """An export folder with fixed files and the file of all widths."""
    assert run("onnx", exported / "ckpt.pt", "--bits", "runtime", "-o", exported / "out", cwd=exported).returncode == 0
    assert (exported / "out" / "ckpt.onnx").read_bytes() == (runtime_files / "ckpt.onnx").read_bytes()
    with np.load(DIGITS_DATA) as data:
        np.savez(exported / "few.npz", inputs=data["inputs"][:40], labels=data["labels"][:40])
    return exported


def test_right_files_pass_as_deployed_and_layer_by_layer(folder):
    done = run("verify", "out", "--bits", "1,5", "--runtime", "web", "--data", "few.npz", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    found = [(result["artifact"], result["bits"], result["runtime"]) for result in results]
    assert found == [
        (file, bits, f"onnxruntime-web{switched}")
        for bits in (1, 5)
        for file, switched in ((f"ckpt-w{bits}.onnx", ""), ("ckpt.onnx", " switched"))
    ]
    for result in results:
        assert result["unoptimized"]["layers"]["layers.0.bn1"]["error"] < 1e-5
        assert result["as_deployed"]["top1_agreement"] == 1
        assert 0 < result["latency_ms"] < 1000


@pytest.mark.parametrize("file", ["ckpt-w5.onnx", "ckpt.onnx"])
def test_wrong_files_fail(folder, file):
    replace_artifact(
        folder / "out", file, lambda content: changed_onnx(content, "layers.1.conv1.weight.codes", flip_a_bit)
    )
    done = run("verify", "out", "--bits", "5", "--runtime", "web", "--samples", "4", "--json", cwd=folder)
    assert done.returncode == 1
    results = {result["artifact"]: result for result in json.loads(done.stdout)["results"]}
    assert [name for name, result in results.items() if not result["passed"]] == [file]
    assert results[file]["diverged"] == "layers.1.conv1.weight.codes"


def test_what_the_runtime_computes_is_what_is_compared(exported_once, digits, digits_samples):
    """Without the comparison of parameters: the numbers that come out of Node tell right from wrong."""
    inputs, content = digits_samples.inputs[:16], artifact(exported_once, "onnx", 4)
    for deployed in (True, False):
        for changed, right in ((content, True), (scaled_onnx(content, 1.001), False)):
            runner = BACKENDS["onnx"].open_program("web", changed, deployed=deployed)
            assert compare(digits, 4, runner.run((inputs,)), inputs).passed == right
    assert np.array_equal(
        runner.run_untouched((inputs,))[0].argmax(1), open_runner(changed).run((inputs,)).output.argmax(1)
    )


def test_files_of_a_fixed_batch_pass(folder):
    assert run("onnx", "ckpt.pt", "--bits", "5", "--batch", "3", "-o", "three", cwd=folder).returncode == 0
    done = run("verify", "three", "--bits", "5", "--runtime", "web", "--data", "few.npz", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "onnxruntime-web batch 3" in " ".join(done.stdout.split())


@pytest.mark.parametrize("case", ["ds_cnn", "resnet20q", "shortcuts", "branches", "one axis"])
def test_integers_are_equal_to_the_last_bit(case):
    model, inputs = calibrated_case(case)
    for bits in (4, 8):
        verdict = verdict_of(model, bits, integer_onnx(model, bits), inputs)
        assert verdict.passed, verdict.problems
    content = runtime_integer_onnx(model, [bits for bits in model.info.widths if bits < 8])
    assert verdict_of(model, 4, content, inputs, switched=True).passed


def verdict_of(model, bits, content, inputs, *, switched=False, rounding="web"):
    network = integer_model(model, bits)
    runtime = IntegerWebRuntime(content, network, switched=switched)
    runtime.rounding = rounding
    widths = [width for width in model.info.widths if width < 8]
    fresh = runtime_integer_onnx(model, widths) if switched else integer_onnx(model, bits)
    parameters = BACKENDS["onnx"].compare_parameters(content, fresh, bits, switched=switched)
    comparison = IntegerComparison(model, network, runtime, runtime, parameters)
    comparison.add(inputs)
    return comparison.verdict()


def test_integers_that_are_not_those_of_the_runtime_fail(digits_samples):
    model = load_checkpoint(DIGITS_INT)
    content = integer_onnx(model, 8)
    inputs = digits_samples.inputs[:128]
    assert verdict_of(model, 8, content, inputs).passed
    # onnxruntime itself adds levels in another order, which shows where a sum lies between two levels.
    assert verdict_of(model, 8, content, inputs, rounding="real").diverged == "layers.1.act1"
    changed = changed_onnx(content, "layers.1.conv1.weight.codes", flip_a_bit)
    assert not verdict_of(model, 8, changed, inputs[:8]).passed


def test_inputs_of_every_kind_arrive():
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.first, self.act, self.last = (
                nn.Embedding(50, 8),
                nn.Linear(8, 8),
                nn.ReLU(),
                nn.Linear(8, 4),
            )

        def forward(self, tokens, counts, image):
            x = self.last(self.act(self.first(self.words(tokens)))) * counts[:, :, None].float()
            return x.sum(1) + image.float().mean((1, 2))[:, None], x.argmax(-1)

    signature = (
        InputInfo("tokens", (7,), "int64", below=50),
        InputInfo("counts", (7,), "bool"),
        InputInfo("image", (3, 2), "uint8"),
    )
    model = TruncModel(prepare(Kinds(), (2, 8)).eval(), CheckpointInfo("test", {}, signature, (2, 8)))
    ((_, content),) = export_onnx(model, (8,))
    generator = np.random.default_rng(0)
    batch = (
        generator.integers(0, 50, (5, 7)),
        generator.integers(0, 2, (5, 7)).astype(bool),
        generator.integers(0, 256, (5, 3, 2)).astype(np.uint8),
    )
    there, here = WebSession(content), OnnxSession(content)
    assert there.output_names == here.output_names
    for one, other in zip(there.run(batch), here.run(batch), strict=True):
        assert one.dtype == other.dtype
        assert np.allclose(one, other, atol=1e-5)
    with pytest.raises(InputError, match="the file takes 3 inputs"):
        there.run(batch[:2])
    with pytest.raises(InputError, match="onnxruntime-web does not run the batch: "):
        there.run((batch[0] + 50, *batch[1:]))
    assert np.allclose(there.run(batch)[0], here.run(batch)[0], atol=1e-5)


def test_what_is_no_file_is_refused_and_a_process_that_ended_is_started_again(exported_once, digits_samples):
    content, sample = artifact(exported_once, "onnx", 4), (digits_samples.inputs[:1],)
    with pytest.raises(InputError, match="onnxruntime-web does not load the file: "):
        WebSession(content[: len(content) // 2])
    session = WebSession(content)
    expected = session.run(sample)[0]
    web_session._node()._process.kill()
    with pytest.raises(InputError, match="ends the process that runs it in onnxruntime-web"):
        session.run(sample)
    assert np.array_equal(WebSession(content).run(sample)[0], expected)


def test_sessions_that_nobody_needs_are_closed(exported_once, digits_samples):
    content, sample = artifact(exported_once, "onnx", 4), (digits_samples.inputs[:1],)
    kept = WebSession(content)
    number = WebSession(content)._number
    assert web_session._node().closed == [number]
    kept.run(sample)
    assert web_session._node().closed == []
