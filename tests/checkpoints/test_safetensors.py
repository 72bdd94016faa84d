"""Native checkpoints without pickle: what goes in comes out, codes included, and what is wrong is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import pytest
import torch
from commands import run
from places import DIGITS
from safetensors.torch import load_file, save_file

from tqexport import CheckpointInfo, ReadOptions, Scheme, load_checkpoint, prepare, save_checkpoint
from tqexport.artifacts.project import open_project
from tqexport.checkpoints import safe_file
from tqexport.errors import InputError, TqExportError, UsageError
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import direct_codes, normalize, settle, store

LAYER = "layers.0.conv0.weight"


@pytest.fixture
def saved(digits, tmp_path):
    save_checkpoint(tmp_path / "net.safetensors", digits.module, digits.info)
    return tmp_path / "net.safetensors"


def rewrite(path, change):
    """Change what a file holds, and give it the hash that belongs to it."""
    tensors = load_file(path)
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    record = json.loads(header["__metadata__"]["tqexport"])["checkpoint"]
    change(record, tensors)
    document = {"checkpoint": record, "sha256": safe_file._sha256(record, tensors)}
    save_file(tensors, path, {"tqexport": json.dumps(document)})


def test_what_is_saved_is_loaded(saved, digits, tmp_path):
    loaded = load_checkpoint(saved)
    assert loaded.info == digits.info
    wanted = digits.module.state_dict()
    state = loaded.module.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in wanted.items())
    stored = load_file(saved)[f"{LAYER}.codes"]
    assert stored.dtype == torch.uint8
    assert torch.equal(stored, direct_codes(normalize(wanted[LAYER]), 8).byte())
    save_checkpoint(tmp_path / "again.safetensors", loaded.module, loaded.info)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_convert_writes_either_and_commands_read_both_by_content(tmp_path):
    for source, target in ((DIGITS, "a.safetensors"), ("a.safetensors", "b.pt")):
        assert run("convert", source, target, cwd=tmp_path).returncode == 0
    (tmp_path / "c.pt").write_bytes((tmp_path / "a.safetensors").read_bytes())
    shown = [
        json.loads(run("inspect", name, "--json", cwd=tmp_path).stdout) for name in ("a.safetensors", "b.pt", "c.pt")
    ]
    for document in shown:
        document.pop("checkpoint"), document.pop("sha256")
    assert shown[0] == shown[1] == shown[2]
    assert open_project(tmp_path / "a.safetensors", tmp_path, ReadOptions()).file_name("onnx", (4,)) == "a-w4.onnx"


def test_codes_that_cannot_be_shifted_are_stored_for_every_width(tmp_path):
    scheme = Scheme("dorefa")
    module = prepare(torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3))), (2, 8), scheme=scheme)
    info = CheckpointInfo("net:build", {}, (6,), (2, 8), scheme)
    save_checkpoint(tmp_path / "net.safetensors", module, info)
    names = {key for key in load_file(tmp_path / "net.safetensors") if ".codes" in key}
    assert names == {"1.weight.codes.w2", "1.weight.codes.w8"}


def test_tensors_of_others_are_a_state_dict(tmp_path):
    from tqexport.networks.research_models import svhnq

    save_file(svhnq(expansion=2, widths=[2, 8]).state_dict(), tmp_path / "research.safetensors")
    assert load_checkpoint(tmp_path / "research.safetensors").info.architecture == "svhnq"


@pytest.mark.parametrize("quantizer", ["truncquant", "dorefa"])
def test_a_weight_on_a_boundary_gets_the_code_that_the_file_has(quantizer):
    weight = torch.randn(1 << 20, generator=torch.Generator().manual_seed(3)) * 0.2
    bits = (8,) if quantizer == "truncquant" else (5, 8)
    codes = {width: direct_codes(normalize(weight), width, quantizer).byte() for width in bits}
    x = normalize(weight.double()) * (256 if quantizer == "truncquant" else 255)
    beyond = x - 0.5 * (quantizer == "dorefa")
    near = ((beyond - beyond.round()).abs() < 8 * 256 * 2.0**-24) & (beyond.round() > 0) & (weight.abs() > 0.01)
    assert 5 < int(near.sum()) < 500
    other = beyond.round() - (beyond >= beyond.round()).double() + (quantizer == "dorefa")  # across the boundary
    codes[8] = torch.where(near, other.byte(), codes[8])
    differed = codes[8] != direct_codes(normalize(weight), 8, quantizer).byte()
    assert int(differed.sum()) > 5
    settled = settle(weight, codes, quantizer)
    for width, stored in codes.items():
        assert torch.equal(direct_codes(normalize(settled), width, quantizer).byte(), stored)
    assert torch.equal(settled[~differed], weight[~differed])
    assert (settled - weight).abs().max() < 1e-6


def test_the_file_decides_on_a_boundary_and_codes_that_are_others_are_refused(saved):
    weight = load_file(saved)[LAYER]
    away = (normalize(weight.double()) * 256) % 1
    nearest = int((away - 0.5).abs().argmax())  # to a boundary, yet too far for rounding
    middle = int((away - 0.5).abs().argmin())
    for place in (nearest, middle):
        original = saved.read_bytes()

        def change(record, tensors, place=place):
            tensors[f"{LAYER}.codes"].view(-1)[place] += 1 if away.view(-1)[place] > 0.5 else -1

        rewrite(saved, change)
        with pytest.raises(InputError, match=r"damaged: layer layers.0.conv0: 1 of its [0-9,]+ codes are not those of"):
            load_checkpoint(saved)
        saved.write_bytes(original)

    def on_a_boundary(record, tensors):
        """Move a weight a hair below the boundary that its code lies above of."""
        flat, codes = tensors[LAYER].view(-1), tensors[f"{LAYER}.codes"].view(-1)
        flat[middle] = _weight_below(tensors[LAYER], int(codes[middle]))

    rewrite(saved, on_a_boundary)
    loaded = load_checkpoint(saved)
    stored = load_file(saved)
    assert not torch.equal(direct_codes(normalize(stored[LAYER]), 8).byte(), stored[f"{LAYER}.codes"])
    used = quantized_weights(loaded.module)[LAYER].original
    assert torch.equal(store(used, 3).codes, stored[f"{LAYER}.codes"])


def _weight_below(weight, code):
    """The largest float32 weight whose code is the one below."""
    largest = weight.double().tanh().abs().max()
    value = torch.atanh((torch.tensor(code / 256, dtype=torch.float64) - 0.5) * 2 * largest).float()
    scale = weight.abs().max()
    while int(direct_codes(normalize(torch.stack([value, scale])), 8)[0]) >= code:
        value = torch.nextafter(value, torch.tensor(-10.0))
    return value


def _drop(key):
    return lambda record, tensors: (record if key in record else tensors).pop(key)


REFUSED = {
    "no widths": (lambda r, _: r.update(widths=[]), "damaged"),
    "width 9": (lambda r, _: r.update(widths=[9]), "damaged"),
    "a later version": (lambda r, _: r.update(format_version=2), "format 2"),
    "std 0": (lambda r, _: r.update(normalization={"mean": [0.5], "std": [0]}), "damaged"),
    "no list of what is quantised": (_drop("quantized"), "damaged"),
    "quantised is a number": (lambda r, _: r.update(quantized=3), "damaged"),
    "no codes": (_drop(f"{LAYER}.codes"), "damaged"),
    "codes of another type": (lambda _, t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].int()}), "damaged"),
    "codes of another shape": (lambda _, t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"][:1].clone()}), "shape"),
    "missing key": (_drop("fc.bias"), "missing fc.bias"),
    "NaN": (lambda _, t: t[LAYER].mul_(torch.nan), "layers.0.conv0 holds NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_as_in_other_checkpoints(case, saved):
    change, message = REFUSED[case]
    rewrite(saved, change)
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(saved)
    assert str(saved) in str(caught.value)


def test_a_file_does_not_choose_what_is_imported(saved):
    rewrite(saved, lambda record, _: record.update(architecture="os:mkdir"))
    with pytest.raises(UsageError, match="runs code of its own"):
        load_checkpoint(saved)


def test_every_damage_is_refused(saved):
    """A flipped bit, wherever it is, does not get past the hash; nor does a file that ends early."""
    content, random = saved.read_bytes(), Random(5)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [random.randrange(header) for _ in range(60)] + [random.randrange(header, len(content)) for _ in range(60)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(TqExportError):
            load_checkpoint(saved)
    for size in (9, 100, header, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(InputError):
            load_checkpoint(saved)


HOSTILE = {
    "a long header": (2**40).to_bytes(8, "little") + b"{}",
    "a deep header": b"[" * 100_000,
    "a deep record": {"__metadata__": {"tqexport": "[" * 100_000}},
    "metadata that is a list": {"__metadata__": ["tqexport"]},
    "NaN in the record": {"__metadata__": {"tqexport": '{"checkpoint": {"widths": [NaN]}, "sha256": ""}'}},
    "a tensor beyond the end": {"x": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}},
    "tensors that overlap": {name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for name in "ab"},
    "a shape without end": {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}},
    "a type that does not exist": {"x": {"dtype": "F7", "shape": [0], "data_offsets": [0, 0]}},
    "a terminal's escape in a key": {"\x1b]0;x\x07": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_made_to_harm_are_refused_in_a_sentence(case, tmp_path):
    header = HOSTILE[case]
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = b"" if case == "a long header" else len(header).to_bytes(8, "little")
    (tmp_path / "net.safetensors").write_bytes((length if header[:1] in b"[{" else b"") + header)
    done = run("inspect", "net.safetensors", cwd=tmp_path)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.strip().isprintable()


def test_what_json_would_change_is_not_written(digits, tmp_path):
    for arguments in ({"size": (3, 3)}, {"sizes": {1: 2}}, {"call": print}, {"limit": float("nan")}):
        with pytest.raises((UsageError, InputError), match=r"JSON|plain values"):
            save_checkpoint(tmp_path / "x.safetensors", digits.module, replace(digits.info, arguments=arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_without_codes_is_not_written(digits, tmp_path):
    module = load_checkpoint(DIGITS).module
    quantized_weights(module)[LAYER].original.data.zero_()
    with pytest.raises(InputError, match="all zeros"):
        save_checkpoint(tmp_path / "x.safetensors", module, digits.info)
