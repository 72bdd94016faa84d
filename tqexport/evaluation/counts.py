"""What is counted of samples. Counts are whole numbers, so the order in which they are added changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError
from tqexport.reading import records
from tqexport.verification.classes import same_classes
from tqexport.verification.samples import Labels

__all__ = ["Counts"]

Array = npt.NDArray[Any]


class Counts:
    """Counts of samples that several subjects put into classes.

    Attributes:
        samples: How many there were.
        labelled: How many of them had a label that the classes can be compared with.
        agreeing: int64 (subjects, subjects): how many samples two subjects put into the same classes, by every output.
        confusion: For each subject, how many labelled samples of a class it put into a class, by (label, class).
    """

    def __init__(self, subjects: int) -> None:
        """Counts of nothing yet."""
        self.samples = self.labelled = 0
        self.agreeing = np.zeros((subjects, subjects), np.int64)
        self.confusion: list[Counter[tuple[int, int]]] = [Counter() for _ in range(subjects)]

    def add(self, classes: Sequence[Sequence[Array]], labels: Labels | None) -> None:
        """Count samples.

        Args:
            classes: For each subject and output the classes of the samples, (N, ...).
            labels: Class of each sample by the first output, (N,), if known.
        """
        self.samples += len(classes[0][0])
        for row, own in enumerate(classes):
            for column, others in enumerate(classes[: row + 1]):
                agreeing = int(same_classes(own, others).sum())
                self.agreeing[row, column] += agreeing
                if column != row:
                    self.agreeing[column, row] += agreeing
        if labels is None or any(own[0].shape != labels.shape for own in classes):
            return
        self.labelled += len(labels)
        for counter, own in zip(self.confusion, classes, strict=True):
            counter.update(zip(labels.tolist(), own[0].tolist(), strict=True))

    def merge(self, other: Counts) -> None:
        """Add the counts of other samples."""
        self.samples += other.samples
        self.labelled += other.labelled
        self.agreeing += other.agreeing
        for own, others in zip(self.confusion, other.confusion, strict=True):
            own.update(others)

    def right(self, subject: int) -> int:
        """How many labelled samples a subject put into their class."""
        return sum(count for (label, predicted), count in self.confusion[subject].items() if label == predicted)

    def record(self) -> dict[str, Any]:
        """The counts for a JSON file; the same counts give the same text."""
        return {
            "samples": self.samples,
            "labelled": self.labelled,
            "agreeing": self.agreeing.tolist(),
            "confusion": [[[*pair, count] for pair, count in sorted(one.items())] for one in self.confusion],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], subjects: int) -> Counts:
        """The counts that :meth:`record` gave.

        Raises:
            InputError: They are of other subjects, or no counts.
        """
        counts = cls(subjects)
        try:
            counts.samples = records.whole(record["samples"], "samples")
            counts.labelled = records.whole(record["labelled"], "labelled")
            counts.agreeing += np.array([records.wholes(row, "agreeing") for row in record["agreeing"]], np.int64)
            for own, rows in zip(counts.confusion, record["confusion"], strict=True):
                for row in rows:
                    label, predicted, count = records.wholes(row, "confusion")
                    own[label, predicted] += count
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("counts are missing, or of something else") from error
        return counts
