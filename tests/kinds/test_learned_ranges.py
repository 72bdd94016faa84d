"""Activations whose ranges are learned, signed ones too: their files are exact, and wrong ones are called so."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from exactness import assert_exact, verdicts
from onnx import numpy_helper
from torch import nn

from tqexport import CheckpointInfo, TruncModel, load_checkpoint, prepare, save_checkpoint
from tqexport.analysis.inspection import inspect_model
from tqexport.backends import BACKENDS, open_runner
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.template import _rounds
from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import ConversionError, InputError
from tqexport.integer.capture import capture_calls
from tqexport.training.ranges import ranges_of
from tqexport.verification.comparison import Comparison
from tqexport.verification.samples import noise

WIDTHS = (1, 3, 4, 8)
SHAPE = (5, 6)


class Attending(nn.Module):
    """Attention whose heads are put together in front of a rounding, and a perceptron."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.query, self.key, self.value, self.mix = (nn.Linear(8, 8) for _ in range(4))
        self.perceptron = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        y = self.norm(x)
        heads = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.mix(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return self.last((x + self.perceptron(x)).mean(1))


def build():
    return prepare(Attending(), WIDTHS, learned_ranges=True)


def trained():
    """The network after the batch that finds its ranges; those that read one value are no longer alike."""
    torch.manual_seed(1)
    network = build()
    network.train()(torch.randn(16, *SHAPE))
    with torch.no_grad():
        for place, quantizer in enumerate(ranges_of(network).values()):
            quantizer.range.mul_(0.6 + 0.1 * place)
    return network.eval()


def model_of(network, widths=WIDTHS):
    return TruncModel(network, CheckpointInfo("test", {}, SHAPE, widths))


def linear_model(**options):
    """Two linear layers with something signed in between."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4))
    network = prepare(network, (4,), float_layers=["0"], learned_ranges=True)
    network.train()(torch.randn(16, 6))
    return TruncModel(network.eval(), CheckpointInfo("test", {}, (6,), (4,), **options))


@pytest.fixture(scope="module")
def files():
    """The network, and its files of both formats by width, which are exact: fixed and run-time ones."""
    network = trained()
    return network, assert_exact(network, SHAPE, WIDTHS)


def test_inputs_and_relus_have_ranges_and_their_files_are_exact(files):
    network, _ = files
    assert [*ranges_of(network)] == [
        *(f"{name}.input_quantizer" for name in ("query", "key", "value", "mix", "perceptron.0")),
        "perceptron.1",
    ]


@pytest.mark.parametrize(("part", "factor"), [("levels", 1.01), ("low", 0.5), ("high", 0.7)])
def test_a_wrong_grid_is_found_in_both_formats(files, part, factor):
    network, by_width = files
    in_onnx, in_tflite = by_width[3]
    wrong = onnx.load_from_string(in_onnx)
    (tensor,) = [each for each in wrong.graph.initializer if each.name == f"query.input_quantizer.{part}"]
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((value * factor).astype("float32"), tensor.name))
    flat = FlatModel(in_tflite)
    same = [index for index in range(len(flat.graph.tensors)) if np.array_equal(flat.constant(index), value)]
    assert same
    for index in same:
        flat.set_constant(index, value * np.float32(factor))
    model, batch = model_of(network), noise(16, model_of(network).info.signature).inputs
    for name, content, right in (("onnx", wrong.SerializeToString(), in_onnx), ("tflite", flat.pack(), in_tflite)):
        assert BACKENDS[name].compare_parameters(content, right, 3, switched=False).differences
        comparison = Comparison(model, 3)
        comparison.add(open_runner(content, None, deployed=True).run(batch), batch)
        assert not comparison.verdict().passed


def test_two_roundings_that_a_converter_made_one_are_compared_all_the_same():
    torch.manual_seed(3)
    network = build().eval()  # all ranges are as they were before training
    ((_, content),) = export_onnx(model_of(network, (4,)), (4,))
    merged = onnx.load_from_string(content)
    rounding = {node.name: node for node in merged.graph.node if node.op_type == "Round"}
    one, other = rounding["query.input_quantizer/Round"], rounding["key.input_quantizer/Round"]
    for node in merged.graph.node:
        node.input[:] = [one.output[0] if name == other.output[0] else name for name in node.input]
    merged.graph.node.remove(other)
    model = model_of(network, (4,))
    assert all(verdict.passed for verdict in verdicts(model, merged.SerializeToString(), 4))
    with torch.no_grad():  # then they are not one any more
        ranges_of(network)["key.input_quantizer"].range.mul_(0.9)
    (problem, *_) = verdicts(model, merged.SerializeToString(), 4)[0].problems
    assert problem == "activation key.input_quantizer/Round is not in the file"


class Stateful(nn.Module):
    """Two steps of a recurrence that starts at zero."""

    def __init__(self):
        super().__init__()
        self.first, self.of_state, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 8)
        for row in self.first(x)[:, :2].unbind(1):
            state = (row + self.of_state(state)).tanh()
        return self.last(state)


def test_a_rounding_of_what_is_the_same_for_every_sample_may_be_a_constant():
    torch.manual_seed(5)
    network = prepare(Stateful(), (4,), learned_ranges=True)
    network.train()(torch.randn(8, *SHAPE))
    model = model_of(network.eval(), (4,))
    ((_, content),) = export_onnx(model, (4,))
    computed = onnx.load_from_string(content)
    first, second = [node for node in computed.graph.node if node.op_type == "Round"]
    assert _rounds(computed) == [second.output[0]]
    computed.graph.node.remove(first)
    computed.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 8), np.float32), first.output[0]))
    assert all(verdict.passed for verdict in verdicts(model, computed.SerializeToString(), 4))
    wrong = onnx.ModelProto.FromString(computed.SerializeToString())
    wrong.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.ones((1, 8), np.float32), first.output[0]))
    assert not any(verdict.passed for verdict in verdicts(model, wrong.SerializeToString(), 4))


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_checkpoint_holds_the_ranges(tmp_path, name):
    network = trained()
    info = CheckpointInfo(f"{__name__}:build", {}, SHAPE, WIDTHS)
    save_checkpoint(tmp_path / name, network, info)
    model = load_checkpoint(tmp_path / name, ReadOptions(model=info.architecture))
    x = torch.randn(3, *SHAPE)
    with torch.no_grad(), model.at_width(3) as loaded, model_of(network).at_width(3) as saved:
        assert torch.equal(loaded(x), saved(x))
    assert all(quantizer.found for quantizer in ranges_of(model.module).values())
    reports = inspect_model(model).ranges
    assert [(each.name, each.signed) for each in reports][-2:] == [
        ("perceptron.0.input_quantizer", True),
        ("perceptron.1", False),
    ]
    assert all(each.range == float(ranges_of(network)[each.name].range.detach()) for each in reports)


@pytest.mark.parametrize("size", [0.0, float("inf"), float("nan")])
def test_a_range_of_nothing_is_refused_by_name(tmp_path, size):
    model = linear_model()
    quantizer = ranges_of(model.module)["2.input_quantizer"]
    quantizer.range.data.fill_(size)
    sentence = f"the range of 2.input_quantizer is {size:g}, of which no levels can be made"
    with pytest.raises(InputError, match=sentence):
        save_checkpoint(tmp_path / "net.pt", model.module, model.info)
    with pytest.raises(InputError, match=sentence):
        next(export_onnx(model, (4,)))


def test_it_has_no_integer_form():
    with pytest.raises(ConversionError, match=r"2\.input_quantizer: an activation whose range is learned has no integ"):
        capture_calls(linear_model().module, (6,))


def test_at_32_bits_of_activations_nothing_is_rounded():
    model = linear_model(activation_bits=(32,))
    ((_, content),) = export_onnx(model, (4,))
    assert not [node for node in onnx.load_from_string(content).graph.node if node.op_type in ("Round", "Clip")]
    assert all(verdict.passed for verdict in verdicts(model, content, 4))
