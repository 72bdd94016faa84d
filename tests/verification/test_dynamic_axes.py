"""Axes beside the batch that may have any size: right files pass at every size, a file for one size alone fails."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, InputInfo, TruncModel, load_checkpoint, prepare, save_checkpoint
from tqexport.backends import BACKENDS
from tqexport.backends.base import input_infos
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.verification.comparison import Comparison
from tqexport.verification.run import verify_made
from tqexport.verification.samples import noise
from tqexport.verification.sizes import of_other_sizes
from tqexport.verification.trial import project_of

ONNX = BACKENDS["onnx"]


class Pictures(nn.Module):
    """Every size of picture that two strides take."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()
        self.second, self.norm, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.act(self.norm(self.second(self.act(self.first(x))))))


class Tokens(nn.Module):
    """A transformer over any number of tokens, and a mask of as many."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, tokens, mask):
        x = self.layer(self.table(tokens), src_key_padding_mask=mask)
        return self.head(x.sum(1) / tokens.shape[1])


class Twos(nn.Module):
    """Takes the two samples of its first user for all that there are."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x).reshape(2, 2)


def build():
    return prepare(Pictures(), (2, 8))


def model_of(network, *inputs):
    torch.manual_seed(0)
    return TruncModel(prepare(network, (2, 8)).eval(), CheckpointInfo("any", {}, inputs, (2, 8)))


@pytest.fixture(scope="module")
def pictures():
    info = InputInfo("image", (3, 16, 12), dynamic={1: "height", 2: "width"})
    return project_of(model_of(Pictures(), info))


@pytest.fixture(scope="module")
def tokens():
    inputs = (
        InputInfo("tokens", (12,), "int64", 30, {0: "length"}),
        InputInfo("mask", (12,), "bool", dynamic={0: "length"}),
    )
    return project_of(model_of(Tokens(), *inputs))


@pytest.mark.parametrize("name", ["pictures", "tokens"])
def test_files_pass_at_other_sizes_too(name, request):
    project = request.getfixturevalue(name)
    signature = project.model.info.signature
    fixed = list(project.make("onnx", (2, 8)))
    run_time = ONNX.export_runtime(project)
    for files, switched in ((fixed, False), ([(8, run_time)], True)):
        for checked in verify_made(project, ONNX, "exact", files, noise(2, signature), run_time=switched):
            assert checked.passed, checked.problems
            assert checked.deployed.samples == 2  # those of other sizes are not among the shares
    described, _ = ONNX.describe(fixed[0][1])
    assert input_infos(described, ONNX.facts(fixed[0][1])) == signature
    session = ONNX.open_session(fixed[1][1])
    sizes = {"height": 33, "width": 7, "length": 5}
    inputs = noise(3, [info.resized(sizes) for info in signature]).inputs
    inputs[-1][:, 0] = 0  # of what is masked altogether ONNX gives no number
    (output,) = session.run(inputs)
    with torch.no_grad(), project.model.at_width(8) as network:
        expected = network(*map(torch.from_numpy, inputs)).numpy()
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() < 0.05 * np.abs(expected).max()  # a level or two, where there are levels


def test_other_formats_have_the_size_of_the_shape(pictures):
    (content,) = convert_to_tflite([onnx.load_from_string(c) for _, c in pictures.make("onnx", (8,))])
    tflite = BACKENDS["tflite"]
    (taken,), (given,) = tflite.describe(content)
    assert (taken.shape, given.shape) == ((1, 16, 12, 3), (1, 8, 6, 4))
    assert tflite.facts(content).dynamic_sizes == {}
    samples = noise(2, pictures.model.info.signature)
    (checked,) = verify_made(pictures, tflite, "exact", [(8, content)], samples, run_time=False)
    assert checked.passed, checked.problems


def test_a_file_that_is_right_at_one_size_alone_fails(tokens):
    """The mean divides by a constant in the place of the length."""
    ((_, content),) = tokens.make("onnx", (8,))
    changed = onnx.load_from_string(content)
    (division,) = [node for node in changed.graph.node if node.op_type == "Div" and "/Div" not in node.input[0]][-1:]
    changed.graph.initializer.append(numpy_helper.from_array(np.float32(12), "twelve"))
    division.input[1] = "twelve"
    model = tokens.model
    for others in (False, True):
        comparison = Comparison(model, 8)
        runner = ONNX.open_runner(changed.SerializeToString())
        inputs = noise(2, model.info.signature).inputs
        comparison.add(runner.run(inputs), inputs)
        if others:
            inputs = of_other_sizes(model).inputs
            comparison.add(runner.run(inputs), inputs, counted=False)
        verdict = comparison.verdict()
        assert verdict.passed is not others, verdict.problems
        assert verdict.samples == 2


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoints_keep_the_names_of_sizes(tmp_path, suffix):
    info = InputInfo("image", (3, 16, 12), dynamic={2: "width"})
    model = model_of(Pictures(), info)
    path = tmp_path / f"net{suffix}"
    here = CheckpointInfo(f"{__name__}:build", {}, (info,), (2, 8))
    save_checkpoint(path, model.module, here)
    (read,) = load_checkpoint(path, ReadOptions(model=f"{__name__}:build")).info.signature
    assert read == info
    assert read.dynamic_axes == {2: "width"}


@pytest.mark.parametrize(
    ("shape", "dynamic", "words"),
    [
        ((3, 16), {2: "width"}, r"input x has no axis 2 of a size from 2 in \(3, 16\); axes are counted from 0"),
        ((3, 1), {1: "width"}, "has no axis 1 of a size from 2"),
        ((3, 16), {1: "batch"}, "'batch' cannot be the name of a size"),
        ((3, 16), {1: "a b"}, "'a b' cannot be the name of a size"),
    ],
)
def test_wrong_axes_are_refused(shape, dynamic, words):
    with pytest.raises(UsageError, match=words):
        InputInfo("x", shape, dynamic=dynamic)


def test_axes_of_one_name_have_one_size():
    inputs = (InputInfo("a", (4,), dynamic={0: "n"}), InputInfo("b", (5,), dynamic={0: "n"}))
    with pytest.raises(UsageError, match="n is 4 and 5; axes of one name have one size"):
        CheckpointInfo("any", {}, inputs, (8,))


def test_a_network_of_one_size_is_refused():
    """What flattens a picture in front of a linear layer has one size of picture."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 3))
    model = model_of(network, InputInfo("x", (1, 8, 8), dynamic={1: "height"}))
    with pytest.raises(ConversionError, match="computes with a height of 8 alone"):
        list(project_of(model).make("onnx", (8,)))
    fixed = model_of(Twos(), InputInfo("x", (3,)))
    with pytest.raises(ConversionError, match=r"computes with a batch of 2 alone.*take it from the input's shape"):
        list(project_of(fixed).make("onnx", (8,)))
    with pytest.raises(InputError, match="height may have any size in the file, and the network takes no other"):
        of_other_sizes(model)
