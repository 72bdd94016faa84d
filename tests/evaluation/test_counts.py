"""Counts add up to the same whatever the parts and the order."""

import json
from random import Random

import numpy as np
import pytest

from tqexport.errors import InputError
from tqexport.evaluation.counts import Counts

LABELS = np.random.default_rng(0).integers(0, 5, 400)
CLASSES = [[np.random.default_rng(seed).integers(0, 5, 400)] for seed in (1, 2, 3)]


def counted(parts):
    counts = []
    for rows in parts:
        counts.append(Counts(3))
        counts[-1].add([[values[0][rows]] for values in CLASSES], LABELS[rows])
    return counts


def merged(counts):
    total = Counts(3)
    for one in counts:
        total.merge(one)
    return json.dumps(total.record())


def test_parts_in_any_order_add_up_to_the_whole():
    (whole,) = counted([slice(None)])
    parts = counted([slice(start, start + 37) for start in range(0, 400, 37)])
    for seed in range(5):
        Random(seed).shuffle(parts)
        assert merged(parts) == json.dumps(whole.record())


def test_counts_are_what_numpy_counts():
    (whole,) = counted([slice(None)])
    assert whole.samples == whole.labelled == 400
    for row, (own,) in enumerate(CLASSES):
        assert whole.right(row) == (own == LABELS).sum()
        assert whole.confusion[row][3, 1] == ((LABELS == 3) & (own == 1)).sum()
        assert whole.agreeing[row].tolist() == [(own == other).sum() for (other,) in CLASSES]


def test_samples_of_many_classes_agree_where_all_of_them_are_the_same():
    maps = np.zeros((4, 2, 2), np.int64)
    other = maps.copy()
    other[1, 0, 1] = 1
    counts = Counts(2)
    counts.add([[maps], [other]], np.zeros(4, np.int64))
    assert counts.agreeing.tolist() == [[4, 3], [3, 4]]
    assert (counts.samples, counts.labelled) == (4, 0)  # a label says nothing of a map of classes


def test_counts_are_read_as_they_were_written():
    (whole,) = counted([slice(None)])
    record = json.loads(json.dumps(whole.record()))
    assert Counts.from_record(record, 3).record() == whole.record()


@pytest.mark.parametrize(
    "changed",
    [
        {"samples": -1},
        {"agreeing": [[1, 2], [3]]},
        {"agreeing": [[1.5] * 3] * 3},
        {"confusion": [[]]},
        {"confusion": [[[1, 2]], [], []]},
    ],
)
def test_other_counts_are_refused(changed):
    (whole,) = counted([slice(None)])
    with pytest.raises(InputError):
        Counts.from_record({**whole.record(), **changed}, 3)
