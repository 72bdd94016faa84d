"""``tqexport verify`` as CI and people use it: pictures, reports, pairs of artifacts, and what a machine may lack."""

from __future__ import annotations

import hashlib
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import DIGITS_DATA
from PIL import Image
from test_cli import files, run
from test_damage import LAYER, changed_onnx, changed_tflite, flip_a_bit

from tqexport.errors import InputError
from tqexport.verification.comparison import wilson_interval
from tqexport.verification.samples import load_samples


def write_pictures(folder, count=40, name=str, size=1, mode="L"):
    """The digits as pictures, a folder per class."""
    with np.load(DIGITS_DATA) as data:
        inputs, labels = data["inputs"], data["labels"]
    for number, (pixels, label) in enumerate(zip(inputs[:count], labels[:count], strict=True)):
        target = folder / name(label) / f"{number:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels[0] * 255).round().astype(np.uint8))
        picture.resize((8 * size, 8 * size), Image.Resampling.NEAREST).convert(mode).save(target)
    return folder


# Pictures


def test_a_folder_of_pictures_is_as_good_as_an_array(digits, tmp_path):
    found = load_samples(write_pictures(tmp_path / "pictures"), digits)
    given = load_samples(DIGITS_DATA, digits)
    assert found.inputs.shape == (40, 1, 8, 8)
    assert found.description == "on the 40 pictures of pictures"
    order = sorted(range(40), key=lambda i: (given.labels[i], i))
    assert np.array_equal(found.labels, given.labels[order])
    assert np.abs(found.inputs - given.inputs[order]).max() < 0.01  # pixels of 8 bits
    scaled = load_samples(write_pictures(tmp_path / "large", size=5, mode="RGB"), digits)
    assert scaled.inputs.shape == (40, 1, 8, 8)
    assert np.corrcoef(scaled.inputs.ravel(), found.inputs.ravel())[0, 1] > 0.95


REFUSED = {
    "no pictures": (lambda folder: folder.mkdir(), "holds no pictures; put those of each class"),
    "an unknown class": (
        lambda folder: write_pictures(folder, 3, lambda label: f"digit{label}"),
        "is named after no class",
    ),
    "no picture": (
        lambda folder: (
            (write_pictures(folder, 3) / "3" / "0.png").parent.mkdir(exist_ok=True)
            or (folder / "3" / "0.png").write_bytes(b"no")
        ),
        "0.png is not a readable picture",
    ),
    "a class out of range": (lambda folder: write_pictures(folder, 3, lambda _: "17"), "is named after no class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_folders_are_refused_with_what_to_do(digits, tmp_path, case):
    prepare, message = REFUSED[case]
    prepare(tmp_path / "pictures")
    with pytest.raises(InputError, match=message):
        load_samples(tmp_path / "pictures", digits)


def test_wilson_intervals_hold_the_share_and_shrink():
    assert wilson_interval(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)  # published: 72.2 % for 10 of 10
    assert wilson_interval(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    low, high = wilson_interval(0.5, 10_000)
    assert 0.49 < low < 0.5 < high < 0.51


# The report


class Page(HTMLParser):
    """What a page is made of."""

    void = frozenset({"meta", "link", "img", "br", "input", "source", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for name, v in attributes if name in ("src", "href", "xlink:href", "data", "srcset") and v]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.remove(tag) if tag in self.open and tag not in self.void else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_whole_page(exported):
    done = run("verify", "out", "--bits", "2,8", "--data", DIGITS_DATA, "--report", "report.html", cwd=exported)
    assert done.returncode == 0, done.stdout + done.stderr
    content = (exported / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    page.close()
    assert page.open == []
    assert all(link.startswith("#") for link in page.links), page.links
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "@import" not in content
    assert "url(http" not in content
    assert str(exported) not in content
    assert page.tags.count("svg") == 7  # accuracy, size, latency, flips, layers, and the weights of two widths
    assert 'name="viewport"' in content
    assert "prefers-color-scheme: dark" in content
    text = " ".join(page.text)
    for expected in (
        "PASS: every artifact equals PyTorch", "ckpt-w2.onnx", "ckpt-w8.tflite", "layers.1.conv1", "Accuracy by width",
        "Size by width", "Error by layer", "Weights at 2 bits", "Weights at 8 bits", "Latency by width", "onnxruntime",
    ):  # fmt: skip
        assert expected in text, expected
    assert files(exported) == sorted([*files(exported), "report.html"])[: len(files(exported))]
    assert not [name for name in files(exported) if name.endswith(".tmp")]


def test_a_report_of_a_failure_says_what_is_wrong(exported):
    damage(exported / "out", "ckpt-w4.onnx", lambda content: changed_onnx(content, f"{LAYER}.weight.codes", flip_a_bit))
    done = run("verify", "out", "--bits", "4", "--samples", "4", "--report", "r.html", cwd=exported)
    assert done.returncode == 1
    content = (exported / "r.html").read_text(encoding="utf-8")
    assert f"layer {LAYER}: 1 of 9216 codes differ" in content
    assert "verdict failed" in content


# Two artifacts


def damage(folder, name, change):
    """Change an artifact and enter its new hash, as a build that went wrong would."""
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    manifest = folder / "tqexport.json"
    content = json.loads(manifest.read_text())
    for entry in content["artifacts"]:
        if entry["file"] == name:
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_two_artifacts_are_compared_without_a_checkpoint(exported, bits):
    (exported / "ckpt.pt").unlink()
    first, second = f"out/ckpt-w{bits}.tflite", f"out/ckpt-w{bits}.onnx"
    done = run("verify", first, second, "--data", DIGITS_DATA, "--json", cwd=exported)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["codes"] == 76_288
    assert found["codes_wrong"] == found["activations_wrong"] == 0
    assert found["activations"] == 450 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4)
    assert 0 < found["output_error"] < found["tolerance"] < 2e-4
    assert all(side["accuracy"] > 0.9 for side in found["sides"])


def scaled(content):
    return changed_onnx(content, f"{LAYER}.weight.scale", lambda value: value * np.float32(1.02))


DAMAGED = {
    "a code": (
        "tflite",
        lambda c: changed_tflite(c, f"{LAYER}.weight.codes", flip_a_bit),
        f"layer {LAYER}: 1 of 9216 codes",
    ),
    "a scale": ("onnx", scaled, "activation layers.1.act1: "),
    "the last layer": (
        "onnx",
        lambda content: changed_onnx(content, "fc.bias", lambda value: np.roll(value, 1)),
        "the outputs are off by",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_two_artifacts_that_differ_are_told_apart_and_the_layer_is_named(exported, case):
    kind, change, message = DAMAGED[case]
    path = exported / "out" / f"ckpt-w2.{kind}"
    path.write_bytes(change(path.read_bytes()))
    done = run("verify", "out/ckpt-w2.onnx", "out/ckpt-w2.tflite", cwd=exported)
    assert done.returncode == 1
    assert message in done.stdout
    assert "FAIL: the artifacts differ, first in " in done.stdout.splitlines()[-1]


def test_pairs_that_make_no_sense_are_refused(exported):
    for arguments, exit_code, message in (
        (["out/ckpt-w2.onnx", "out/ckpt-w4.onnx"], 2, "computes with 4 bits, so it cannot be compared at 2"),
        (["out/ckpt-w2.onnx"], 2, "name two artifacts"),
        (["out/ckpt-w2.onnx", "out/none.onnx"], 3, "none.onnx cannot be read"),
        (["out/ckpt-w2.onnx", "out/tqexport.json"], 3, "tqexport.json"),
        (["out/ckpt-w2.onnx", "out/ckpt-w2.tflite", "--report", "r.html"], 2, "without a checkpoint"),
    ):
        done = run("verify", *arguments, cwd=exported)
        assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
        assert message in done.stderr


# What a machine may lack


def run_without(module, *arguments, cwd):
    """The command where a module cannot be imported."""
    hide = cwd / "hide"
    hide.mkdir(exist_ok=True)
    (hide / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None\n")
    return run(*arguments, cwd=cwd, env={**os.environ, "PYTHONPATH": str(hide)})


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("onnxruntime", ["out", "--bits", "2"], "pip install onnxruntime"),
        ("ai_edge_litert", ["out", "--bits", "2"], "pip install ai-edge-litert"),
        ("tensorflow", ["ckpt.pt", "--bits", "2"], "pip install tensorflow"),
        ("matplotlib", ["out", "--bits", "2", "--report", "r.html"], "pip install 'tqexport[report]'"),
        ("jinja2", ["out", "--bits", "2", "--report", "r.html"], "pip install 'tqexport[report]'"),
        ("PIL", ["out", "--bits", "2", "--data", "pictures"], "pip install 'tqexport[report]'"),
    ],
)
def test_what_is_missing_is_named_with_what_to_install(exported, module, arguments, message):
    write_pictures(exported / "pictures", 3)
    done = run_without(module, "verify", *arguments, cwd=exported)
    assert done.returncode == 4, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (exported / "r.html").exists()


def test_a_damaged_file_is_refused_before_the_others_run(exported):
    path = exported / "out" / "ckpt-w8.tflite"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    done = run("verify", "out", "--bits", "1-8", cwd=exported)
    assert (done.returncode, done.stdout) == (3, "")
    assert "ckpt-w8.tflite is not the file that was exported" in done.stderr
    assert run("verify", "out", "--bits", "1", "--samples", "2", cwd=exported).returncode == 0
