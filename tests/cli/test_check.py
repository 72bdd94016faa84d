"""``tqexport check`` says before any training what becomes of a network, and says no where an export would."""

from __future__ import annotations

import json

import pytest
from commands import run
from damage import changed_onnx, flip_a_bit

from tqexport.backends.onnx import OnnxBackend

NETWORKS = """
import torch
from torch import nn
from tqexport import InputInfo, prepare

class Net(nn.Module):
    def __init__(self, inner=None, classes=3):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.act, self.inner, self.gate = nn.ReLU(), inner or nn.Identity(), nn.SiLU()
        self.last = nn.Linear(4, classes)

    def forward(self, x):
        x = self.inner(self.act(self.first(x)))
        return self.last(self.gate(self.third(torch.relu(self.second(x)))).mean((2, 3)))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.middle, self.idle = nn.GRU(4, 4, batch_first=True), nn.Bilinear(2, 2, 2)

    def forward(self, tokens, mask):
        return self.last(self.middle(self.first(self.table(tokens)) * mask[:, :, None])[0][:, -1])

class Own(nn.Conv2d):
    pass

def plain(**options): return Net(**options)
def ready():
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    return prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), grouped, nn.BatchNorm2d(4),
                                 nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), (2, 4))
def own(): return Net(Own(4, 4, 1))
def attention(): return nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
                                      nn.Linear(4, 2)), (InputInfo("input", (5, 4)),)
def tokens(): return Tokens()
def norm(): return Net(nn.GroupNorm(2, 4))
def broken(): raise RuntimeError("no such file of weights")
def number(): return 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    (folder / "nets_to_check.py").write_text(NETWORKS)
    return folder


def check(folder, *arguments, shape="1,8,8"):
    shape = ("--input-shape", shape) if shape else ()
    done = run("check", *arguments, *shape, "--json", cwd=folder)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_it_says_what_is_quantised_and_why_the_rest_is_not(folder):
    code, said, people = check(folder, "nets_to_check:plain", "--argument", "classes=5")
    assert code == 0
    parts = {part["name"]: part for part in said["parts"]}
    assert {name for name, part in parts.items() if part["quantized"]} == {"second", "third", "act"}
    assert "first layer" in parts["first"]["reason"]
    assert "last layer" in parts["last"]["reason"]
    assert parts["last"]["shape"] == [5, 4]
    assert "ReLU alone" in parts["gate"]["reason"]
    assert "nn.ReLU" in parts["relu"]["reason"]
    assert said["widths"] == [2, 8]
    answers = {(answer["format"], answer["file"]): answer for answer in said["formats"]}
    assert answers["onnx", "fixed"]["certain"]
    assert answers["onnx", "run-time"]["taken"]
    assert not answers["tflite", "fixed"]["certain"]
    assert answers["c", "fixed"]["why"].startswith("gate: SiLU has no integer form")
    assert said["refusing"] == []  # C was not asked for
    assert people.rstrip().endswith("GOOD: onnx and tflite take the network; --convert makes sure of it")
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"nets_to_check.py"}


def test_the_formats_that_are_asked_decide_on_the_exit_code(folder):
    code, said, people = check(folder, "nets_to_check:norm", "--format", "c")
    assert (code, said["refusing"], said["asked"]) == (3, ["c"], ["c"])
    assert {answer["format"] for answer in said["formats"]} == {"c"}
    assert "inner: GroupNorm has no integer form" in people
    assert people.rstrip().endswith("REFUSED by c")


def test_a_prepared_network_keeps_its_widths_and_takes_every_format(folder):
    code, said, _ = check(folder, "nets_to_check:ready", "--format", "c")
    assert (code, said["widths"], said["prepared_by_factory"]) == (0, [2, 4], True)
    assert all(answer["taken"] for answer in said["formats"])
    done = run("check", "nets_to_check:ready", "--input-shape", "1,8,8", "--bits", "8", cwd=folder)
    assert done.returncode == 2
    assert "no BatchNorm for 8 bits; it has 2, 4" in done.stderr


def test_inputs_are_named_by_options_or_by_the_factory(folder):
    inputs = ("--input", "tokens:int64:6:9", "--input", "mask:bool:6")
    code, said, _ = check(
        folder, "nets_to_check:tokens", *inputs, "--float-layers", "last", "--format", "c", shape=None
    )
    assert code == 3
    assert said["inputs"][0] == {"name": "tokens", "shape": [6], "dtype": "int64", "below": 9, "dynamic": []}
    parts = {part["name"]: part for part in said["parts"]}
    assert parts["last"]["reason"] == "named in float_layers"
    assert "Bilinear is none of the kinds" in parts["idle"]["reason"]
    assert parts["middle.weight_ih_l0"]["quantized"]
    refused = {answer["format"]: answer["why"] for answer in said["formats"] if not answer["taken"]}
    assert "float32 input" in refused["c"]
    code, said, _ = check(folder, "nets_to_check:attention", "--format", "c", shape=None)
    assert (code, said["inputs"][0]["shape"]) == (3, [5, 4])
    parts = {part["name"]: part for part in said["parts"]}
    quantized = {name for name, part in parts.items() if part["quantized"]}
    assert {name for name in quantized if "self_attn" in name} == {
        name for name in parts if "self_attn" in name and name != "1.self_attn"
    }
    assert any("in_proj_weight" in name for name in quantized)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("nets_to_check:plain", 2, "nothing says what the network takes"),
        ("nets_to_check:nothing --input-shape 1,8,8", 2, "cannot import"),
        ("nets_to_check:broken --input-shape 1,8,8", 3, "RuntimeError: no such file of weights"),
        ("nets_to_check:number --input-shape 1,8,8", 3, "returned a int"),
        ("nets_to_check:plain --input-shape 1,8,8 --input x:float32:3", 2, "not both"),
        ("nets_to_check:plain --input x:float32", 2, "NAME:DTYPE:SHAPE"),
        ("nets_to_check:plain --input x:int64:3", 2, "below"),
        ("nets_to_check:plain --input-shape 1,8,8 --argument classes", 2, "NAME=VALUE"),
        ("nets_to_check:plain --input-shape 1,8,8 --float-layers nowhere", 2, "nowhere"),
        ("nets_to_check:ready --input-shape 1,8,8 --float-layers 0", 2, "in there"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(folder, line, code, words):
    done = run("check", *line.split(), cwd=folder)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_convert_makes_the_files_and_compares_them(folder):
    # Of a network with grouped convolutions TensorFlow says not which output is which.
    code, said, _ = check(folder, "nets_to_check:ready", "--convert", "--format", "tflite")
    assert (code, said["refusing"]) == (0, []), said
    assert [(a["format"], a["file"], a["verified"]) for a in said["formats"]] == [
        ("tflite", "fixed", True),
        ("tflite", "run-time", True),
    ]


def test_a_file_that_differs_is_no_refusal(folder, monkeypatch):
    export = OnnxBackend.export

    def with_a_wrong_code(*arguments):
        for bits, content in export(*arguments):
            yield bits, changed_onnx(content, "3.weight.codes", flip_a_bit)

    monkeypatch.setattr(OnnxBackend, "export", with_a_wrong_code)
    code, said, people = check(folder, "nets_to_check:ready", "--convert", "--format", "onnx", "--bits", "2")
    assert code == 1, people
    (answer,) = said["formats"]  # of one width there is no run-time file
    assert (answer["verified"], answer["taken"]) == (False, False)
    assert "layer 3" in answer["why"]
