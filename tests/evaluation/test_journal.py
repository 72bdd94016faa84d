"""A journal keeps what is done, whatever ends the run, and nothing of another evaluation."""

import dataclasses
import json

import numpy as np
import pytest

from tqexport.errors import InputError, UsageError
from tqexport.evaluation.counts import Counts
from tqexport.evaluation.journal import Journal
from tqexport.evaluation.subjects import Subject

SUBJECTS = [Subject("net-w2.onnx", "ab" * 32, 2, "onnxruntime", "onnxruntime", "onnx", "exact")]


def counts(samples):
    made = Counts(1)
    made.add([[np.zeros(samples, np.int64)]], np.zeros(samples, np.int64))
    return made


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", SUBJECTS)
    journal.keep("a", counts(3))
    journal.keep("b", counts(4))
    return journal.path


def test_what_is_kept_is_there_again(path):
    again = Journal(path, SUBJECTS)
    assert {key: one.samples for key, one in again.done.items()} == {"a": 3, "b": 4}


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_is_removed_and_its_shard_is_done_again(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    assert [*Journal(path, SUBJECTS).done] == ["a"]
    Journal(path, SUBJECTS).keep("b", counts(4))
    assert [*Journal(path, SUBJECTS).done] == ["a", "b"]


def test_a_journal_that_was_just_begun_is_begun_again(path):
    path.write_bytes(path.read_bytes()[:10])
    assert not Journal(path, SUBJECTS).done
    assert path.read_bytes().count(b"\n") == 1


def test_other_files_are_refused_and_left_as_they_are(path):
    other = dataclasses.replace(SUBJECTS[0], bits=3)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="has counts of other files, widths or runtimes"):
        Journal(path, [other])
    assert path.read_bytes() == before
    for content in (b"my notes", b"my notes\n", b'{"a": 1}\n', before + b"no json\n", b"\xff\n", before[:-2] + b"0}\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no journal of an evaluation"):
            Journal(path, SUBJECTS)
        assert path.read_bytes() == content


def test_lines_are_json(path):
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["subjects"][0]["file"] == "net-w2.onnx"
    assert [line["shard"] for line in lines] == ["a", "b"]
