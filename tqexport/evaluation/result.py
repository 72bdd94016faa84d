"""What came of an evaluation: counts of all shards, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqexport.evaluation.counts import Counts
from tqexport.evaluation.subjects import Subject
from tqexport.verification.classes import wilson_interval

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """Counts over all shards.

    Attributes:
        checkpoint: What the subjects were exported from.
        subjects: What was evaluated, by width and runtime.
        shards: How many shards there were.
        counts: Their counts.
    """

    checkpoint: str
    subjects: Sequence[Subject]
    shards: int
    counts: Counts

    def accuracy(self, subject: int) -> float | None:
        """Share of the labelled samples that a subject puts into their class."""
        return self.counts.right(subject) / self.counts.labelled if self.counts.labelled else None

    def interval(self, subject: int) -> tuple[float, float] | None:
        """95 % confidence interval of the accuracy."""
        accuracy = self.accuracy(subject)
        return None if accuracy is None else wilson_interval(accuracy, self.counts.labelled)

    def agreement(self, subject: int, other: int) -> float:
        """Share of the samples that two subjects put into the same classes."""
        return int(self.counts.agreeing[subject, other]) / self.counts.samples

    def widest(self, subject: int) -> int:
        """The subject of the same runtime and kernel with the most bits."""
        own = self.subjects[subject]
        alike = [
            index
            for index, other in enumerate(self.subjects)
            if (other.runtime, other.kernel, other.run_time) == (own.runtime, own.kernel, own.run_time)
        ]
        return max(alike, key=lambda index: self.subjects[index].bits)

    def confused(self, subject: int) -> tuple[int, int, int] | None:
        """The label and the other class that a subject puts most of its samples into, and how many."""
        wrong = {pair: count for pair, count in self.counts.confusion[subject].items() if pair[0] != pair[1]}
        if not wrong:
            return None
        most = min(wrong, key=lambda pair: (-wrong[pair], pair))
        return *most, wrong[most]

    def document(self) -> dict[str, Any]:
        """Everything as JSON; the same counts give the same text."""
        counts = self.counts.record()
        return {
            "checkpoint": self.checkpoint,
            "shards": self.shards,
            "samples": self.counts.samples,
            "labelled": self.counts.labelled,
            "results": [
                {
                    "artifact": subject.file,
                    **{name: value for name, value in asdict(subject).items() if name not in ("file", "title")},
                    "correct": self.counts.right(index) if self.counts.labelled else None,
                    "accuracy": self.accuracy(index),
                    "accuracy_interval": self.interval(index),
                    "confusion": counts["confusion"][index],
                }
                for index, subject in enumerate(self.subjects)
            ],
            "agreeing": counts["agreeing"],
        }
