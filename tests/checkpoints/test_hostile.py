"""Checkpoints that are damaged or made to harm are refused before anything is built of them."""

from __future__ import annotations

import contextlib
import io
import pickle
import time
import zipfile
from random import Random

import pytest
import torch
from places import DIGITS

from tqexport import CheckpointInfo, load_checkpoint, save_checkpoint
from tqexport.errors import InputError, TqExportError
from tqexport.networks.registry import ARCHITECTURES


def with_pickle(content):
    """The digits checkpoint with another pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(DIGITS) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return stream.getvalue()


def sharing(levels):
    """A tuple with 2 to the power of ``levels`` leaves, in a few bytes."""
    shared = ("leaf",)
    for _ in range(levels):
        shared = (shared, shared)
    return pickle.dumps({"format": shared}, 2)


HOSTILE = {
    "shared tuples": sharing(40),
    "a deep tuple": b"\x80\x02K\x01" + b"\x85" * 1_000_000 + b".",
    "deep lists": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "many opcodes": b"\x80\x02(" + b"K\x01" * 3_000_000 + b"l.",
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_made_to_harm_are_refused_in_seconds(tmp_path, name, legacy):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(HOSTILE[name] if legacy else with_pickle(HOSTILE[name]))
    start = time.monotonic()
    with pytest.raises(InputError, match="made to harm"):
        load_checkpoint(path)
    assert time.monotonic() - start < 10


def test_a_flipped_bit_in_any_weight_is_refused(tmp_path):
    random, path, original = Random(0), tmp_path / "ckpt.pt", DIGITS.read_bytes()
    with zipfile.ZipFile(DIGITS) as archive:
        places = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 64]
    for _ in range(50):
        entry, content = random.choice(places), bytearray(original)
        # Behind the local header, whose name and padding are shorter than half of the entry's data.
        position = entry.header_offset + 30 + len(entry.filename) + entry.file_size // 2 + 60
        content[position] ^= 1 << random.randrange(8)
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"damaged in its part|not a PyTorch checkpoint"):
            load_checkpoint(path)


def test_damage_anywhere_is_an_error_that_says_so(tmp_path):
    random, path, original = Random(1), tmp_path / "ckpt.pt", DIGITS.read_bytes()
    for number in range(150):
        content = bytearray(original)
        if number % 3:
            for _ in range(random.randrange(1, 8)):
                near_the_end = len(content) - 1 - random.randrange(4_000)
                content[random.choice((near_the_end, random.randrange(2_000)))] = random.randrange(256)
        else:
            del content[random.randrange(len(content)) :]
        path.write_bytes(content)
        with contextlib.suppress(TqExportError):
            load_checkpoint(path)


def test_the_old_format_still_loads(tmp_path):
    content = torch.load(DIGITS, weights_only=True)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt").info == load_checkpoint(DIGITS).info


ODD = [
    None,
    {},
    [],
    "x",
    -1,
    0,
    float("nan"),
    float("inf"),
    torch.zeros(2),
    torch.zeros(2, device="meta"),
    torch.zeros(2).to_sparse(),
    10**30,
    [-1],
]
ODD += [{"mean": [0], "std": [0]}, {"mean": [0.5], "std": [float("nan")]}, [10**9] * 3, (1, 2), {"a": {}}, True, b"x"]


def test_entries_of_another_type_are_refused_in_a_sentence(tmp_path):
    path, arguments = tmp_path / "ckpt.pt", {"size": 8, "hidden": 4, "widths": (8,)}
    info = CheckpointInfo("autoencoder", arguments, (8,), (8,))
    save_checkpoint(path, ARCHITECTURES["autoencoder"](**arguments), info)
    content = torch.load(path, weights_only=True)
    assert load_checkpoint(path).info == info
    sentences = []
    for key in [*content, "grids"]:
        for value in ODD:
            torch.save({**content, key: value}, path)
            try:
                load_checkpoint(path)
            except TqExportError as error:
                sentences.append(str(error))
    assert len(sentences) > 200
    assert not [sentence for sentence in sentences if "\n" in sentence]


@pytest.mark.parametrize("std", [[0.0], [float("nan")], [0.5, 0.5, 0.5]])
def test_a_normalization_that_divides_by_nothing_is_refused(tmp_path, std):
    content = torch.load(DIGITS, weights_only=True)
    torch.save({**content, "normalization": {"mean": [0.5], "std": std}}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="damaged tqexport checkpoint"):
        load_checkpoint(tmp_path / "ckpt.pt")
