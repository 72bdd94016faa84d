"""Networks with several inputs and outputs, of any type, in both formats and at every width."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from exactness import assert_exact, verdicts
from networks import convert, randomize_
from torch import Tensor, nn

from tqexport import (
    CheckpointInfo,
    InputInfo,
    ReadOptions,
    TruncModel,
    calibrate_batch_norms,
    joint_backward,
    load_checkpoint,
    prepare,
    save_checkpoint,
)
from tqexport.backends.onnx.export import export_onnx
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.integer.calibration import calibrate
from tqexport.runtime import SwitchableModel
from tqexport.verification.samples import load_samples, noise
from tqexport.verification.trace import furthest_apart

WIDTHS = (2, 8)


class Detector(nn.Module):
    """A picture and six numbers; a dict of three outputs, two of them of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side, self.middle = nn.Linear(6, 8), nn.Linear(8, 8)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.act, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, image: Tensor, extra: Tensor) -> dict[str, Tensor]:
        x = self.act(self.norm(self.body(self.stem(image))))
        sides = self.middle(self.act2(self.side(extra)))
        x = x + sides[:, :, None, None]
        return {"boxes": self.boxes(x), "scores": self.scores(x), "sides": sides}


class Text(nn.Module):
    """Words by number, and which of them count; a tuple with whole numbers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.hidden, self.last = (
            *(nn.Embedding(50, 16), nn.Linear(16, 16)),
            *(nn.Linear(16, 16), nn.Linear(16, 4)),
        )
        self.act, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act2(self.hidden(self.act(self.first(self.words(tokens))))) * counts[:, :, None].float()
        return self.last(x.sum(1)), x.argmax(-1)


class Pixels(nn.Module):
    """Bytes of a picture, and the exposure as one number a sample; the input is returned, too."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, image: Tensor, exposure: Tensor) -> tuple[Tensor, Tensor]:
        x = self.network(image.float() / 255 * exposure[:, None, None, None])
        return x, x.mean((2, 3))


SIGNATURES = {
    Detector: (InputInfo("image", (3, 8, 9)), InputInfo("extra", (6,))),
    Text: (InputInfo("tokens", (7,), "int64", below=50), InputInfo("counts", (7,), "bool")),
    Pixels: (InputInfo("image", (3, 8, 9), "uint8"), InputInfo("exposure", ())),
}


def model_of(kind: type[nn.Module]) -> TruncModel:
    network = prepare(kind(), WIDTHS).eval()
    randomize_(network, 0)
    return TruncModel(network, CheckpointInfo("test", {}, SIGNATURES[kind], WIDTHS))


@pytest.mark.parametrize("kind", SIGNATURES)
def test_every_file_is_exact(kind):
    assert_exact(model_of(kind).module, SIGNATURES[kind], WIDTHS)


def test_names_are_those_of_the_network():
    (_, content), *_ = export_onnx(model_of(Detector), (8,))
    graph = onnx.load_from_string(content).graph
    assert [value.name for value in graph.input] == ["image", "extra"]
    assert [value.name for value in graph.output] == ["boxes", "scores", "sides"]


def swapped(content: bytes) -> bytes:
    """The same file, the first two outputs of which changed places but not names."""
    model = onnx.load_from_string(content)
    names = {"boxes": "scores", "scores": "boxes"}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
    return model.SerializeToString()


def without_the_last(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    del model.graph.output[-1]
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "problem"), [(swapped, "output boxes is off by"), (without_the_last, "there are 2 outputs, not 3")]
)
def test_outputs_that_are_others_are_found(change, problem):
    model = model_of(Detector)
    (_, content), *_ = export_onnx(model, (8,))
    for verdict in verdicts(model, change(content), 8):
        assert not verdict.passed
        assert problem in verdict.problems[0]


def test_a_second_output_that_is_no_number_is_infinitely_far():
    right = [np.ones((2, 3), np.float32), np.arange(2)]
    assert furthest_apart(right, right) == 0
    assert furthest_apart([right[0], right[1] + 1], right) == 1
    broken = [right[0], np.array([0, np.nan])]
    assert furthest_apart(broken, right) == furthest_apart(right, broken) == np.inf
    assert furthest_apart(right, right[:1]) == np.inf


def test_applications_get_every_output_by_name():
    model = model_of(Detector)
    batch = noise(2, model.info.signature).inputs
    (_, content), *_ = export_onnx(model, (8,))
    with torch.no_grad(), model.at_width(8) as network:
        expected = network(*map(torch.from_numpy, batch))
    found = SwitchableModel(content).outputs(*batch)
    assert list(found) == ["boxes", "scores", "sides"]
    assert all(np.allclose(found[name], expected[name], atol=1e-5) for name in found)
    converted = SwitchableModel(convert(model)[8]).outputs(np.moveaxis(batch[0], 1, -1), batch[1])
    assert all(np.allclose(converted[name].shape[0], 2) for name in found)
    assert np.allclose(np.moveaxis(converted["scores"], -1, 1), expected["scores"], atol=1e-5)
    with pytest.raises(InputError, match="has the outputs boxes, scores, sides"):
        SwitchableModel(content).run(*batch)
    with pytest.raises(InputError, match="takes 2 inputs"):
        SwitchableModel(content).outputs(batch[0])


def test_a_checkpoint_keeps_the_signature_and_trains_with_it(tmp_path, monkeypatch):
    network = prepare(Text(), WIDTHS)
    batch = [torch.from_numpy(values) for values in noise(4, SIGNATURES[Text]).inputs]

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs[0], targets)

    assert joint_backward(network, batch, torch.zeros(4, dtype=torch.int64), WIDTHS, loss) > 0
    assert network.hidden.parametrizations.weight.original.grad.any()
    with pytest.raises(UsageError, match="several outputs; say with distillation_loss"):
        joint_backward(network, batch, torch.zeros(4, dtype=torch.int64), WIDTHS, loss, distillation=0.5)
    calibrate_batch_norms(network, [batch], (4,))
    factory = SimpleNamespace(build=lambda: prepare(Text(), WIDTHS))
    monkeypatch.setitem(sys.modules, "text_net", factory)
    info = CheckpointInfo("text_net:build", {}, SIGNATURES[Text], WIDTHS)
    save_checkpoint(tmp_path / "text.pt", network, info)
    loaded = load_checkpoint(tmp_path / "text.pt", ReadOptions(model="text_net:build"))
    assert loaded.info.signature == SIGNATURES[Text]


def test_samples_are_read_by_name(tmp_path):
    model = model_of(Text)
    tokens, counts = noise(5, model.info.signature).inputs
    path = tmp_path / "samples.npz"
    np.savez(path, tokens=tokens.astype(np.int32), counts=counts, labels=np.zeros(5, np.int64))
    samples = load_samples(path, model)
    assert [values.dtype.name for values in samples.inputs] == ["int64", "bool"]
    assert np.array_equal(samples.inputs[0], tokens)
    for changed, problem in (
        ({"counts": counts}, "holds no array named tokens"),
        ({"tokens": tokens + 50, "counts": counts}, "tokens hold other numbers than the network's, which are 0 to 49"),
        ({"tokens": tokens + 0.5, "counts": counts}, "tokens hold other numbers"),
        ({"tokens": tokens[:4], "counts": counts}, "there are 4 of tokens, 5 of counts"),
        ({"tokens": tokens[:, :3], "counts": counts}, r"tokens are \(5, 3\), the network takes \(N, 7\)"),
    ):
        np.savez(path, **changed)
        with pytest.raises(InputError, match=problem):
            load_samples(path, model)


class Odd(Detector):
    def forward(self, image: Tensor, extra: Tensor) -> object:
        return {**super().forward(image, extra), "size": 3}


class Twice(Detector):
    def forward(self, image: Tensor, extra: Tensor) -> tuple[Tensor, ...]:
        boxes = super().forward(image, extra)["boxes"]
        return boxes, boxes, extra


def exported(kind: type[nn.Module]) -> bytes:
    network = prepare(kind(), WIDTHS).eval()
    randomize_(network, 0)
    model = TruncModel(network, CheckpointInfo("test", {}, SIGNATURES[Detector], WIDTHS))
    (_, content), *_ = export_onnx(model, (8,))
    assert all(verdict.passed for verdict in verdicts(model, content, 8))
    convert(model)
    return content


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Odd, r"returns a int \(size\) besides tensors"),
        (Twice, "output_1 is the same value as output_0, which a TFLite file has once"),
    ],
)
def test_what_a_file_cannot_have_is_refused(kind, problem):
    with pytest.raises(ConversionError, match=problem):
        exported(kind)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("bits", (3,)), "cannot be the name of an input"),
        (("a b", (3,)), "cannot be the name of an input"),
        (("x", (3,), "float64"), "inputs are float32"),
        (("x", (0,)), "sizes are whole numbers from 1"),
        (("x", (3,), "int64"), "say with below=N"),
        (("x", (3,), "float32", 5), "whole numbers are below 1 or more"),
    ],
)
def test_inputs_that_no_file_has_are_refused(arguments, problem):
    with pytest.raises(UsageError, match=problem):
        InputInfo(*arguments)


def test_a_network_of_integers_takes_one_input_of_floats():
    with pytest.raises(ConversionError, match=r"takes image \(float32\), extra \(float32\)"):
        calibrate(model_of(Detector), np.zeros((200, 3, 8, 9), np.float32))
