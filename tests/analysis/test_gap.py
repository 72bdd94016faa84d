"""The quantisation-truncation gap: none where codes are floored, the formula's where they are rounded."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from places import DIGITS, DIGITS_DATA

from tqexport import (
    CheckpointInfo,
    Scheme,
    TruncModel,
    joint_backward,
    load_checkpoint,
    prepare,
    save_checkpoint,
    set_quantizer,
)
from tqexport.analysis.gap import deploy_truncated, measure_gap, plot_gap
from tqexport.deploy import deploy, deployed_values
from tqexport.errors import InputError
from tqexport.networks.tiny_models import resnet8
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import WIDTHS


@pytest.fixture(scope="module")
def rounded_file(tmp_path_factory):
    """The trained weights of the digits, said to be rounded."""
    content = torch.load(DIGITS, weights_only=True)
    content["scheme"] = {"quantizer": "dorefa", "bias_correction": False}
    path = tmp_path_factory.mktemp("rounded") / "rounded.pt"
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def ordinary_file(tmp_path_factory):
    """A small ResNet-8 trained with rounding on the digits, at 2 and 8 bits."""
    torch.manual_seed(0)
    with np.load(DIGITS_DATA) as file:
        images, labels = torch.from_numpy(file["inputs"]), torch.from_numpy(file["labels"])
    arguments = {"in_channels": 1, "width": 8, "widths": [2, 8]}
    network = resnet8(**arguments)
    set_quantizer(network, Scheme("dorefa"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(15):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            joint_backward(network, images[batch], labels[batch], (2, 8), torch.nn.functional.cross_entropy)
            optimizer.step()
    path = tmp_path_factory.mktemp("ordinary") / "ordinary.pt"
    save_checkpoint(path, network, CheckpointInfo("resnet8", arguments, (1, 8, 8), (2, 8), Scheme("dorefa")))
    return path


def rounding_gap(weights, bits):
    """Codes changed, and both forms of the weights, in numpy."""
    t = np.tanh(weights.astype(np.float64))
    x = t / 2 / np.abs(t).max() + 0.5
    size, steps = np.abs(weights).mean(dtype=np.float64), 2**bits - 1
    direct = np.round(steps * x)
    shifted = np.round(255 * x).astype(int) >> (8 - bits)
    return (direct != shifted).sum(), size * (2 * direct / steps - 1), size * (2 * shifted / steps - 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_changes_what_the_formula_says(digits, rounded_file, bits):
    rounded = load_checkpoint(rounded_file)
    (own,) = measure_gap(rounded, [bits]).widths
    (floored,) = measure_gap(digits, [bits]).widths
    assert own.total == own.rounded_total == floored.rounded_total
    errors = sizes = changed = 0.0
    for weight in quantized_weights(rounded.module).values():
        name = weight.layer
        count, direct, shifted = rounding_gap(weight.original.detach().numpy(), bits)
        assert own.layers[name].changed == pytest.approx(count, abs=2)  # tanh in float32
        error, size = ((direct - shifted) ** 2).sum(), (direct**2).sum()
        assert own.layers[name].error == pytest.approx((error / size) ** 0.5, abs=2e-3)
        errors, sizes, changed = errors + error, sizes + size, changed + own.layers[name].changed
    assert own.total.changed == changed
    assert own.total.error == pytest.approx((errors / sizes) ** 0.5, abs=2e-3)
    assert (own.total.changed_share > 0.05) == (1 < bits < 8)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(bias_correction=True), Scheme(power_of_two_scale=True)], ids=str)
def test_flooring_has_no_gap(scheme):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    network = prepare(layers, float_layers=(), scheme=scheme).eval()
    model = TruncModel(network, CheckpointInfo("net:build", {}, (8,), WIDTHS, scheme))
    gap = measure_gap(model, WIDTHS, (torch.rand(20, 8).numpy(),))
    assert gap.closed
    assert all(width.total.changed == width.total.error == 0 for width in gap.widths)
    assert all(width.accuracy.agreement == 1 and width.accuracy.quantized is None for width in gap.widths)
    assert any(width.rounded_total.changed for width in gap.widths)


def test_the_truncated_network_holds_8_bit_codes_and_a_shift(digits, rounded_file):
    rounded = load_checkpoint(rounded_file)
    for bits in (2, 4):
        shifted, direct = deployed_values(deploy_truncated(rounded, bits)), deployed_values(deploy(rounded, bits))
        key = "layers.0.conv0.weight.codes"
        assert int(shifted[key].max()) > 200
        assert int(direct[key].max()) < 2**bits
        assert int(shifted[key.replace("codes", "shift")]) == 8 - bits
        floored, same = deployed_values(deploy_truncated(digits, bits)), deployed_values(deploy(digits, bits))
        assert all(torch.equal(floored[name], same[name]) for name in same)


def test_the_command_says_that_there_is_no_gap(tmp_path):
    result = run("gap", DIGITS, "--bits", "2,8", "--data", DIGITS_DATA, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "No gap: shifting the 8-bit codes gives exactly what quantising to each width gives." in result.stdout
    assert "Rounding the same weights would change 11.6 % of the codes at 2 bits." in result.stdout
    (row,) = (line.split() for line in result.stdout.splitlines() if line.startswith("    2 "))
    assert row[-4:] == ["99.3", "%", "99.3", "%"]
    document = json.loads(run("gap", DIGITS, "--bits", "4", "--json", cwd=tmp_path).stdout)
    assert document["closed"] is True
    assert document["widths"][0]["layers"]["layers.0.conv0"] == {"weights": 2304, "changed": 0, "error": 0.0}
    assert document["widths"][0]["rounded_layers"]["layers.0.conv0"]["changed"] > 200
    assert document["widths"][0]["accuracy"] is None
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_what_a_rounded_network_loses(ordinary_file, tmp_path):
    line = ("gap", ordinary_file, "--data", DIGITS_DATA, "--plot", "gap.png")
    result = run(*line, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "These codes must not be shifted: that would change " in result.stdout
    assert "At 2 bits accuracy falls from " in result.stdout
    with Image.open(tmp_path / "gap.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    document = json.loads(run(*line, "--json", cwd=tmp_path).stdout)
    assert (document["closed"], document["plot"]) == (False, "gap.png")
    low, high = (width["accuracy"] for width in document["widths"])
    assert low["quantized"] > low["truncated"] + 0.05
    assert low["agreement"] < 1
    assert high["quantized"] == high["truncated"] > 0.9
    ends = run("gap", ordinary_file, "--bits", "8", cwd=tmp_path)
    assert "No code changes at these widths; others may." in ends.stdout


@pytest.mark.parametrize("suffix", ["svg", "PDF"])
def test_plots_in_other_formats(digits, tmp_path, suffix):
    path = tmp_path / f"gap.{suffix}"
    plot_gap(measure_gap(digits, [2, 4]), path)
    assert path.read_bytes()[:5] in (b"<?xml", b"%PDF-")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--plot", "gap.doc"], 2, "gap.doc: a plot is a file that ends in .pdf, .png, .svg"),
        (["--plot", "no/gap.png"], 4, "cannot write no/gap.png: there is no folder no"),
        (["--data", "no.npz"], 3, "no.npz does not exist"),
        (["--bits", "9"], 2, "is no list of widths"),
        (["--quantizer", "dorefa"], 2, "says for itself how it was trained"),
    ],
)
def test_bad_input_is_one_sentence(arguments, code, message, tmp_path):
    result = run("gap", DIGITS, *arguments, cwd=tmp_path)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_is_not_there_is_refused():
    network = prepare(torch.nn.Linear(4, 2), float_layers=()).eval()
    model = TruncModel(network, CheckpointInfo("net:build", {}, (4,), (8,)))
    with pytest.raises(InputError, match="no 4-bit BatchNorm"):
        measure_gap(model, [4])


def test_without_matplotlib_a_plot_is_refused_in_one_sentence(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from tqexport.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "gap", str(DIGITS), "--plot", "gap.png"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 4
    assert "plots need matplotlib; install it with pip install 'tqexport[report]'" in result.stderr
