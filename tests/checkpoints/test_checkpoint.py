"""Native checkpoints: what goes in comes out, and what is wrong is refused in one sentence."""

from __future__ import annotations

import os
import pickle
import sys

import pytest
import torch
from places import DIGITS, DIGITS_INT

from tqexport import CheckpointInfo, Normalization, ReadOptions, Scheme, load_checkpoint, prepare, save_checkpoint
from tqexport.errors import InputError, UsageError
from tqexport.networks.tiny_models import resnet8

INFO = CheckpointInfo(
    architecture="resnet8",
    arguments={"in_channels": 2, "num_classes": 3, "width": 4, "widths": [2, 8]},
    inputs=(2, 9, 7),
    widths=(2, 8),
    scheme=Scheme(),
    activation_bits=(4, 8),
    normalization=Normalization((0.1, 0.2), (0.5, 0.6)),
    class_names=("a", "b", "ç"),
)


def network():
    torch.manual_seed(0)
    return resnet8(**INFO.arguments)


def test_what_is_saved_is_loaded(tmp_path):
    module = network().eval()
    save_checkpoint(tmp_path / "net.pt", module, INFO)
    loaded = load_checkpoint(tmp_path / "net.pt")
    assert loaded.info == INFO
    assert not loaded.module.training
    assert len(loaded.sha256) == 64
    x = torch.randn(2, *INFO.input_shape)
    with torch.no_grad(), loaded.at_width(2) as reference:
        got = reference(x)
        assert {m.bits for n, m in reference.named_modules() if n.endswith("act0")} == {4}
    again = load_checkpoint(tmp_path / "net.pt")
    with torch.no_grad(), again.at_width(2) as reference:
        assert torch.equal(got, reference(x))


def test_the_same_network_gives_the_same_bytes(tmp_path):
    save_checkpoint(tmp_path / "a.pt", network(), INFO)
    save_checkpoint(tmp_path / "b.pt", network(), INFO)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "net.pt", network(), INFO)
    before = (tmp_path / "net.pt").read_bytes()
    module = network()
    module.broken = torch.nn.Parameter(torch.zeros(1))
    module.state_dict = lambda: {"f": lambda: 0}  # cannot be pickled
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "net.pt", module, INFO)
    assert (tmp_path / "net.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _change(**entries):
    def write(path):
        content = torch.load(DIGITS, weights_only=True)
        torch.save({**content, **entries}, path)

    return write


def _change_state(**entries):
    def write(path):
        content = torch.load(DIGITS, weights_only=True)
        for key, value in entries.items():
            key = key.replace("__", ".")
            if value is None:
                del content["state_dict"][key]
            else:
                content["state_dict"][key] = value(content["state_dict"].get(key))
        torch.save(content, path)

    return write


WEIGHT = "layers__0__conv0__weight"
REFUSED = {
    "missing": (lambda _: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is no file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "truncated": (lambda path: path.write_bytes(DIGITS.read_bytes()[:200_000]), "truncated"),
    "text": (lambda path: path.write_text("epoch,loss\n1,0.3\n"), "not a PyTorch checkpoint"),
    "code": (lambda path: torch.save({"format": _RunsCode()}, path), "could run code"),
    "legacy code": (
        lambda path: torch.save({"format": _RunsCode()}, path, _use_new_zipfile_serialization=False),
        "could run code",
    ),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(_RunsCode())), "could run code|not a PyTorch"),
    "a list": (lambda path: torch.save([1, 2], path), "holds a list"),
    "another format": (lambda path: torch.save({"weights": torch.zeros(1)}, path), "none of the known architectures"),
    "no tensors": (lambda path: torch.save({"notes": "hello"}, path), "neither a state_dict entry nor tensors"),
    "a later version": (_change(format_version=2), "format 2"),
    "no widths": (_change(widths=[]), "damaged"),
    "width 9": (_change(widths=[9]), "damaged"),
    "widths of the wrong type": (_change(widths=3), "damaged"),
    "unknown arguments": (_change(arguments={"colour": "red"}), "building resnet8 failed"),
    "a width without BatchNorm": (
        _change(arguments={"in_channels": 1, "widths": [8]}),
        "does not fit its architecture: unexpected bn.bn_dict.1",
    ),
    "missing key": (_change_state(fc__bias=None), "missing fc.bias"),
    "unexpected key": (_change_state(extra=lambda _: torch.zeros(1)), "unexpected extra"),
    "wrong shape": (_change_state(fc__bias=lambda _: torch.zeros(3)), r"fc.bias is \(3,\), not \(10,\)"),
    "NaN": (_change_state(**{WEIGHT: lambda w: w * torch.nan}), "layers.0.conv0 holds NaN"),
    "NaN elsewhere": (_change_state(fc__bias=lambda b: b * torch.inf), "fc.bias holds NaN or infinite"),
    "all zero": (_change_state(**{WEIGHT: lambda w: w * 0}), "layers.0.conv0 is all zeros"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_file_and_the_fault(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[case]
    path = tmp_path / "net.pt"
    make(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before  # nothing was executed, nothing was written


def test_an_unknown_architecture_names_the_known_ones(tmp_path):
    _change(architecture="vgg99")(tmp_path / "net.pt")
    with pytest.raises(UsageError, match=r"vgg99.*resnet8.*--model"):
        load_checkpoint(tmp_path / "net.pt")


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom tqexport import prepare\n"
        "def build(hidden):\n"
        "    return prepare(nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)))\n"
        "def other(hidden):\n    return nn.Linear(hidden, 2)\n"
        "def unprepared(hidden):\n"
        "    return nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    module = prepare(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)))
    info = CheckpointInfo("mine:build", {"hidden": 6}, (4,), (1, 8))
    save_checkpoint("net.pt", module, info)
    try:
        assert load_checkpoint("net.pt", ReadOptions(model="mine:build")).info == info
        save_checkpoint("net.pt", module, CheckpointInfo("elsewhere:build", {"hidden": 6}, (4,), (1, 8)))
        assert load_checkpoint("net.pt", ReadOptions(model="mine:build")).info == info
        for wrong, message in (
            ("mine:nothing", "cannot import"),
            ("nowhere:build", "cannot import"),
            ("mine:nn", "not callable"),
        ):
            with pytest.raises(UsageError, match=message):
                load_checkpoint("net.pt", ReadOptions(model=wrong))
        with pytest.raises(InputError, match="does not fit its architecture: missing weight"):
            load_checkpoint("net.pt", ReadOptions(model="mine:other"))
        with pytest.raises(InputError, match=r"1\.weight was trained quantised, .* has it float; build it as it was"):
            load_checkpoint("net.pt", ReadOptions(model="mine:unprepared"))
    finally:
        sys.modules.pop("mine", None)
        sys.path.remove(str(tmp_path))


def test_a_file_does_not_choose_what_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _change(architecture="os:mkdir", arguments={"path": "executed"})(tmp_path / "net.pt")
    with pytest.raises(UsageError, match=r"built by os:mkdir, which runs code.*--model os:mkdir"):
        load_checkpoint("net.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_a_network_in_data_parallel_is_saved_as_the_network(tmp_path):
    model = load_checkpoint(DIGITS)
    save_checkpoint(tmp_path / "plain.pt", model.module, model.info)
    save_checkpoint(tmp_path / "parallel.pt", torch.nn.DataParallel(model.module), model.info)
    keys = load_checkpoint(tmp_path / "parallel.pt").module.state_dict().keys()
    assert keys == load_checkpoint(tmp_path / "plain.pt").module.state_dict().keys()


@pytest.mark.parametrize("change", [lambda zero: zero.long() + 300, lambda zero: zero.float() + 0.5])
def test_zero_points_that_are_no_bytes_are_refused(tmp_path, change):
    content = torch.load(DIGITS_INT, weights_only=True)
    content["state_dict"]["grids.zero_point"] = change(content["state_dict"]["grids.zero_point"])
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="zero_point holds other numbers than torch"):
        load_checkpoint(tmp_path / "ckpt.pt")
