"""Checkpoints as the research code writes them: every layout loads, and every option reaches the export."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
import zipfile

import onnx
import pytest
import torch
from commands import run
from networks import randomize_
from places import DIGITS, files
from research import training_file

from tqexport import ReadOptions, load_checkpoint
from tqexport.analysis.inspection import inspect_model
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.file import read_facts
from tqexport.errors import InputError, UsageError
from tqexport.networks.research_models import resnet20q
from tqexport.training.quantizers import quantized_weights


def small():
    return randomize_(resnet20q(expansion=1, num_classes=7), 0)


def assert_equal(state, expected):
    """To the last bit, and of the same entries."""
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["module.", ""], ids=["parallel", "single"])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "full"])
@pytest.mark.parametrize("name", ["resnet20q", "my-run-7"])
def test_every_layout_of_the_file_gives_the_same_network(tmp_path, zipped, prefix, bare, name):
    module = small()
    content = training_file(module, name, prefix)
    path = tmp_path / "model_best.pth.tar"
    torch.save(content["state_dict"] if bare else content, path, _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(path)
    assert loaded.info.architecture == "resnet20q"
    assert loaded.info.widths == (1, 2, 4, 8)
    assert loaded.info.input_shape == (3, 32, 32)
    assert loaded.info.arguments["num_classes"] == 7
    assert loaded.assumed
    assert_equal(loaded.module.state_dict(), module.state_dict())


def test_plain_batch_norm_makes_every_width_exportable(tmp_path):
    torch.save(small_shared().state_dict(), tmp_path / "net.pt")
    assert load_checkpoint(tmp_path / "net.pt").info.widths == (1, 2, 3, 4, 5, 6, 7, 8)


def small_shared():
    return randomize_(resnet20q(variant="shared-bn"), 0)


def test_options_describe_what_the_file_does_not(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(training_file(small()), path)
    options = ReadOptions(
        quantizer="dorefa", bias_correction=True, act_bits=(4,), bn_key="activation", input_shape=(3, 48, 40)
    )
    model = load_checkpoint(path, options)
    assert (model.info.scheme.quantizer, model.info.scheme.bias_correction) == ("dorefa", True)
    assert [model.info.activation_width(bits) for bits in model.info.widths] == [4, 4, 4, 4]
    assert [model.info.batch_norm_width(bits) for bits in model.info.widths] == [4, 4, 4, 4]
    assert model.info.input_shape == (3, 48, 40)
    with model.at_width(2) as network:
        assert network.bn.bits == 4
        assert quantized_weights(network)["layers.0.conv0.weight"].quantizer.bits == 2
        assert network.layers[0].act0.bits == 4
    facts = read_facts(onnx.load_from_string(dict(export_onnx(model, (2,)))[2]))
    assert (facts.scheme.quantizer, facts.scheme.bias_correction) == ("dorefa", True)
    assert (facts.width, facts.activation_width, facts.batch_norm_width) == (2, 4, 4)
    assert [load_checkpoint(path, ReadOptions(act_bits=(1, 2, 4, 32))).info.activation_width(b) for b in (1, 8)] == [
        1,
        32,
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (ReadOptions(act_bits=(4, 8)), UsageError, "2 widths; give one, or one for each of the widths 1, 2, 4, 8"),
        (ReadOptions(arch="vgg16q"), UsageError, "'vgg16q' is not one of the known .*resnet20q.*--model"),
        (ReadOptions(arch="svhnq"), InputError, "these tensors are not those of svhnq"),
        (ReadOptions(act_bits=(3,), bn_key="activation"), InputError, "no BatchNorm for \\[3\\] bits"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, error, message):
    torch.save(training_file(small()), tmp_path / "net.pth")
    with pytest.raises(error, match=message):
        load_checkpoint(tmp_path / "net.pth", options)


def test_options_do_not_contradict_a_native_checkpoint():
    with pytest.raises(UsageError, match="says for itself how it was trained; --act-bits, --quantizer"):
        load_checkpoint(DIGITS, ReadOptions(quantizer="dorefa", act_bits=(4,)))


def test_inspect_tells_whether_codes_can_be_truncated(tmp_path):
    torch.save(training_file(small()), tmp_path / "net.pth")
    found = inspect_model(load_checkpoint(tmp_path / "net.pth"))
    assert found.truncatable
    assert set(found.changed.values()) == {0.0}
    quantized = sum(layer.weights for layer in found.layers if layer.quantized)
    assert [layer.name for layer in found.layers if not layer.quantized][:2] == ["conv0", "layers.3.skip_conv"]
    assert found.storage.float32 - found.storage.codes == 3 * quantized
    assert found.storage.packed[8] == found.storage.codes
    assert found.storage.codes - found.storage.packed[2] == quantized * 6 // 8
    assert found.storage.every_width > found.storage.codes

    rounded = inspect_model(load_checkpoint(tmp_path / "net.pth", ReadOptions(quantizer="dorefa")))
    assert not rounded.truncatable
    assert rounded.changed[8] == 0
    assert 0.05 < rounded.changed[2] < 0.5


# Files made to harm: each is refused in little time and memory, and nothing is executed.


def zip_bomb(path):
    stream = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(4)}}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, bytes(300_000_000) if entry.filename.endswith("data/0") else data)


def strided_bomb(path):
    tensor = torch.zeros(1).as_strided((1_000_000, 1_000), (0, 0))
    torch.save({"state_dict": {"conv0.weight": tensor, "fc.weight": tensor}}, path)


def wide_claim(path):
    """Real tensors that claim a network far larger than the file."""
    state = small().state_dict()
    state["conv0.weight"] = torch.zeros(16 * 4000, 3, 3, 3, dtype=torch.uint8)
    torch.save(training_file(small()) | {"state_dict": state}, path)


def running_pickle(path):
    class Runs:
        def __reduce__(self):
            return exec, ("open('executed', 'w')",)

    path.write_bytes(b"\x80\x02" + pickle.dumps(Runs(), protocol=2)[2:])


def truncated_legacy(path):
    stream = io.BytesIO()
    torch.save(training_file(small()), stream, _use_new_zipfile_serialization=False)
    path.write_bytes(stream.getvalue()[:-100_000])


def with_value(value):
    def make(path):
        content = training_file(small())
        content["state_dict"]["module.layers.2.conv1.weight"][0] = value
        torch.save(content, path)

    return make


def other_network(path):
    torch.save({"state_dict": torch.nn.Linear(3, 3).state_dict()}, path)


def half_a_network(path):
    content = training_file(small())
    for key in [key for key in content["state_dict"] if ".layers.5.bn1." in key]:
        del content["state_dict"][key]
    torch.save(content, path)


def not_tensors(path):
    torch.save({"state_dict": {"conv0.weight": "text"}}, path)


HARMFUL = {
    zip_bomb: "unpacks to",
    strided_bomb: "claims 1,000,000,000 elements over 4 bytes",
    wide_claim: "does not fit its architecture",
    running_pickle: "not a PyTorch checkpoint|could run code",
    truncated_legacy: "truncated",
    with_value(float("nan")): "layers.2.conv1 holds NaN",
    with_value(float("inf")): "layers.2.conv1 holds NaN or infinite",
    other_network: "none of the known architectures",
    half_a_network: "missing layers.5.bn1.bn_dict.1",
    not_tensors: "is a str, not a tensor",
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """By case: what is said of the file, the memory in kilobytes that it took, and the files that are there after."""
    folder = tmp_path_factory.mktemp("harmful")
    for number, make in enumerate(HARMFUL):
        (folder / str(number)).mkdir()
        make(folder / str(number) / "net.pth")
    code = (
        "import json, os, resource, sys; from tqexport import load_checkpoint; from tqexport.errors import InputError\n"
        "import tqexport.checkpoints.checkpoint\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before, said = most(), []\n"
        "for folder in sorted(os.listdir(), key=int):\n"
        "    os.chdir(folder)\n"
        "    try: load_checkpoint('net.pth'); said.append(['it was taken', most() - before])\n"
        "    except InputError as error: said.append([str(error), most() - before])\n"
        "    os.chdir('..')\n"
        "print(json.dumps(said))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    there = [[path.name for path in (folder / str(number)).iterdir()] for number in range(len(HARMFUL))]
    return {make: (*said, names) for make, said, names in zip(HARMFUL, json.loads(done.stdout), there, strict=True)}


@pytest.mark.parametrize("make", HARMFUL, ids=lambda make: make.__qualname__)
def test_harmful_files_are_refused_in_little_memory(refusals, make):
    message, kilobytes, names = refusals[make]  # the memory of this file and all before it
    assert re.search(HARMFUL[make], message), message
    assert kilobytes < 500_000
    assert names == ["net.pth"]


def test_the_commands_on_a_research_file(tmp_path):
    torch.save(training_file(small()), tmp_path / "model_best.pth.tar")
    exported = run("onnx", "model_best.pth.tar", "--bits", "2", "--act-bits", "4", cwd=tmp_path)
    assert (exported.returncode, exported.stderr) == (0, "")
    manifest = json.loads((tmp_path / "tqexport-out" / "tqexport.json").read_text())
    assert manifest["options"] == {"act_bits": [4]}
    assert manifest["artifacts"][0]["file"] == "model_best-w2.onnx"
    checked = run("verify", "--samples", "2", "--runtime", "onnxruntime", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    again = run("onnx", "model_best.pth.tar", "--bits", "8", "--act-bits", "4", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    differently = run("verify", "--act-bits", "2", cwd=tmp_path)
    assert differently.returncode == 2

    inspected = run("inspect", "model_best.pth.tar", "--json", cwd=tmp_path)
    assert json.loads(inspected.stdout)["truncatable"] is True
    people = run("inspect", "model_best.pth.tar", "--quantizer", "dorefa", cwd=tmp_path)
    assert "must not be truncated" in people.stdout
    assert "assumed, because the file does not say it: bias correction none" in people.stdout

    converted = run("convert", "model_best.pth.tar", "native.pt", "--act-bits", "4", cwd=tmp_path)
    assert converted.returncode == 0
    native, original = load_checkpoint(tmp_path / "native.pt"), load_checkpoint(tmp_path / "model_best.pth.tar")
    assert native.info.activation_bits == (4, 4, 4, 4)
    assert native.assumed == ()
    assert_equal(original.module.state_dict(), native.module.state_dict())
    itself = run("convert", "native.pt", "native.pt", cwd=tmp_path)
    assert itself.returncode == 2
    assert "is the checkpoint itself" in itself.stderr

    warned = run("onnx", "model_best.pth.tar", "--quantizer", "dorefa", "-o", "rounded", cwd=tmp_path)
    assert warned.returncode == 0
    assert "cannot be truncated" in warned.stderr
    assert "tqexport-out/model_best-w2.tflite" not in files(tmp_path)
