"""Shards of every kind give the samples that are in them."""

import io
import os
import tarfile

import numpy as np
import pytest
from pictures import write_pictures
from places import DIGITS_DATA

from tqexport.errors import InputError
from tqexport.evaluation.shards import PICTURES_IN_SHARD, SampleFormat, find_shards, read_shard
from tqexport.model import InputInfo, Normalization

TAKEN = SampleFormat((InputInfo("inputs", (1, 8, 8), "float32"),), None, tuple("0123456789"))


@pytest.fixture(scope="module")
def digits():
    with np.load(DIGITS_DATA) as data:
        return data["inputs"][:40], data["labels"][:40]


def all_of(shards, taken=TAKEN, count=16):
    parts = [samples for shard in shards for samples in read_shard(shard, taken, count)]
    assert all(len(samples) <= count for samples in parts)
    return np.concatenate([samples.inputs[0] for samples in parts]), [
        label for samples in parts for label in ([None] * len(samples) if samples.labels is None else samples.labels)
    ]


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def test_npz_files_by_pattern_folder_and_name(tmp_path, digits):
    inputs, labels = digits
    for number in range(4):
        rows = slice(10 * number, 10 * number + 10)
        np.savez(tmp_path / f"part-{number}.npz", inputs=inputs[rows], labels=labels[rows])
    by_pattern = find_shards([f"{tmp_path}/part-*.npz"], TAKEN)
    assert [shard.name[-10:] for shard in by_pattern] == [f"part-{number}.npz" for number in range(4)]
    for patterns in ([str(tmp_path)], [f"{tmp_path}/part-[01].npz", f"file://{tmp_path}/part-[0123].npz"]):
        assert find_shards(patterns, TAKEN) == by_pattern  # each once
    values, classes = all_of(by_pattern, count=7)
    assert np.array_equal(values, inputs)
    assert classes == labels.tolist()


def test_samples_are_normalised_as_the_network_wants(tmp_path, digits):
    np.savez(tmp_path / "a.npz", inputs=digits[0])
    taken = SampleFormat(TAKEN.signature, Normalization((0.5,), (2.0,)), ())
    values, classes = all_of(find_shards([str(tmp_path / "a.npz")], taken), taken)
    assert np.array_equal(values, (digits[0] - np.float32(0.5)) / np.float32(2))
    assert classes == [None] * 40


def test_a_folder_of_pictures_is_cut_into_shards(tmp_path, digits, monkeypatch):
    assert PICTURES_IN_SHARD > 100
    monkeypatch.setattr("tqexport.evaluation.shards.PICTURES_IN_SHARD", 15)
    write_pictures(tmp_path, 40, lambda label: f"{label}")
    (tmp_path / "3" / ".hidden").write_bytes(b"")
    shards = find_shards([str(tmp_path)], TAKEN)
    assert [len(shard.files) for shard in shards] == [15, 15, 10]
    values, classes = all_of(shards)
    order = sorted(range(40), key=lambda number: (digits[1][number], number))
    assert np.array_equal(classes, digits[1][order])
    assert np.abs(values - digits[0][order]).max() <= 1 / 255


def test_an_archive_of_arrays_or_pictures_streams(tmp_path, digits):
    inputs, labels = digits
    arrays = [
        file
        for number in range(20)
        for file in ((f"{number:03}.npy", npy(inputs[number])), (f"{number:03}.cls", b"%d\n" % labels[number]))
    ]
    write_tar(tmp_path / "a.tar", arrays)
    values, classes = all_of(find_shards([str(tmp_path / "a.tar")], TAKEN))
    assert np.array_equal(values, inputs[:20])
    assert classes == labels[:20].tolist()
    pictures = sorted(write_pictures(tmp_path / "p", 20).rglob("*.png"), key=lambda path: path.name)
    write_tar(tmp_path / "b.tar", [(f"x/{path.name}", path.read_bytes()) for path in pictures])
    values, classes = all_of(find_shards([str(tmp_path / "b.tar")], TAKEN))
    assert np.abs(values - inputs[:20]).max() <= 1 / 255
    assert classes == [None] * 20


def test_several_inputs_are_arrays_by_name(tmp_path):
    taken = SampleFormat((InputInfo("a", (3,), "float32"), InputInfo("b", (2,), "int64", 10)), None, ())
    files = [("s.a.npy", npy(np.arange(3.0))), ("s.b.npy", npy(np.array([7, 9]))), ("s.cls", b"4")]
    ((samples,),) = [
        list(read_shard(shard, taken, 8)) for shard in find_shards([str(write_tar(tmp_path / "s.tar", files))], taken)
    ]
    assert [values.tolist() for values in samples.inputs] == [[[0.0, 1.0, 2.0]], [[7, 9]]]
    assert [values.dtype for values in samples.inputs] == [np.float32, np.int64]
    assert samples.labels.tolist() == [4]


def test_files_of_other_file_systems_are_read(digits):
    import fsspec

    stream = io.BytesIO()
    np.savez(stream, inputs=digits[0], labels=digits[1])
    fsspec.filesystem("memory").pipe("/bucket/a.npz", stream.getvalue())
    values, classes = all_of(find_shards(["memory://bucket/*.npz"], TAKEN))
    assert np.array_equal(values, digits[0])
    assert classes == digits[1].tolist()


def test_a_changed_file_is_another_shard(tmp_path, digits):
    path = tmp_path / "a.npz"
    np.savez(path, inputs=digits[0])
    (before,) = find_shards([str(path)], TAKEN)
    assert find_shards([str(path)], TAKEN) == [before]
    os.utime(path, (1, 1))
    (after,) = find_shards([str(path)], TAKEN)
    assert after.key != before.key


REFUSED = {
    "nothing": ([], "samples"),
    "a class in words": ([("1.npy", "right"), ("1.cls", b"three")], "1.cls is no class in digits"),
    "a class too many": ([("1.npy", "right"), ("1.cls", b"10")], "labels are 10 to 10"),
    "classes now and then": ([("1.npy", "right"), ("1.cls", b"1"), ("2.npy", "right")], "others have none"),
    "another shape": ([("1.npy", npy(np.zeros((1, 9, 9))))], "the network takes"),
    "no array": ([("1.npy", b"no array")], "1.npy is not a readable array"),
    "a pickle": ([("1.npy", npy(np.array([{}], object)))], "1.npy is not a readable array"),
    "no picture": ([("1.png", b"%!PS-Adobe")], "1.png is not a readable picture"),
    "neither": ([("1.txt", b"")], "has neither a picture nor"),
}


@pytest.mark.parametrize(("files", "expected"), REFUSED.values(), ids=REFUSED)
def test_archives_of_something_else_are_refused(tmp_path, digits, files, expected):
    contents = [(name, npy(digits[0][0]) if content == "right" else content) for name, content in files]
    shards = find_shards([str(write_tar(tmp_path / "a.tar", contents))], TAKEN)
    with pytest.raises(InputError, match=r"a\.tar") as refusal:
        all_of(shards)
    assert expected in str(refusal.value)


def test_a_cut_archive_is_refused(tmp_path, digits):
    path = write_tar(tmp_path / "a.tar", [("1.npy", npy(digits[0][0]))])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"a\.tar is not a readable .tar archive"):
        all_of(find_shards([str(path)], TAKEN))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{}/none-*.npz", "does not exist"),
        ("{}/none.npz", "does not exist"),
        ("{}/notes.txt", "is neither an NPZ file"),
        ("{}/empty", "holds neither NPZ files"),
        ("gopher://somewhere/a.npz", "gopher://somewhere/a.npz cannot be read"),
        ("{}/words", "words/cat is named after no class"),
    ],
)
def test_patterns_of_nothing_are_refused(tmp_path, pattern, expected):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "words", 3, lambda _: "cat")
    with pytest.raises(InputError, match=expected):
        find_shards([pattern.format(tmp_path)], TAKEN)
