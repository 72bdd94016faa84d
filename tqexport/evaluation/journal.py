"""The counts of shards that are done, kept in a file as they come, so that another run can go on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqexport.errors import HostError, InputError, UsageError
from tqexport.evaluation.counts import Counts
from tqexport.evaluation.subjects import Subject
from tqexport.files import ensure_folder
from tqexport.reading import limits
from tqexport.reading.records import mapping, parse_json, text

__all__ = ["Journal"]


class Journal:
    """A file of JSON lines: what was evaluated, then the counts of each shard.

    A line is written at once, behind all others. What a run that was killed left of its last line is removed.

    Attributes:
        path: The file.
        done: Counts of shards by their key.
    """

    def __init__(self, path: Path, subjects: Sequence[Subject]) -> None:
        """Open a journal, or begin one.

        Args:
            path: The file.
            subjects: What is evaluated.

        Raises:
            InputError: The file is no journal.
            UsageError: It is of other subjects.
            HostError: It cannot be written.
        """
        self.path, self._subjects = path, subjects
        self.done: dict[str, Counts] = {}
        head = {"tqexport": "evaluation", "subjects": [asdict(subject) for subject in subjects]}
        ensure_folder(path.parent)
        length = 0
        if path.exists():
            length = self._read(head)
            with _writing(path):
                os.truncate(path, length)
        if not length:
            self._append(head)

    def keep(self, key: str, counts: Counts) -> None:
        """Add the counts of a shard.

        Raises:
            HostError: The file cannot be written.
        """
        self.done[key] = counts
        self._append({"shard": key, "counts": counts.record()})

    def _read(self, head: dict[str, Any]) -> int:
        """Read what is there, as far as lines have their end; returns how many bytes that is."""
        try:
            if self.path.stat().st_size > limits.FILE_BYTES:
                raise InputError("is too large to be a journal")
            *lines, last = self.path.read_bytes().split(b"\n")
            for number, line in enumerate(filter(None, lines)):
                record = mapping(parse_json(line), "a line")
                if number == 0:
                    self._check_head(record, head)
                else:
                    counts = Counts.from_record(mapping(record.get("counts"), "counts"), len(self._subjects))
                    self.done[text(record.get("shard"), "shard")] = counts
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except InputError as error:
            raise InputError(f"{self.path} is no journal of an evaluation ({error}); name another file") from error
        if not lines and not _line(head).startswith(last):
            raise InputError(f"{self.path} is no journal of an evaluation; name another file")
        return sum(len(line) + 1 for line in lines)

    def _check_head(self, record: dict[str, Any], head: dict[str, Any]) -> None:
        if record.get("tqexport") != head["tqexport"]:
            raise InputError("it begins otherwise")
        if record != head:
            raise UsageError(
                f"{self.path} has counts of other files, widths or runtimes; name another file, or leave --resume out"
            )

    def _append(self, record: dict[str, Any]) -> None:
        with _writing(self.path), self.path.open("ab", buffering=0) as stream:
            stream.write(_line(record))
            os.fsync(stream.fileno())


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say of an error what could not be written."""
    try:
        yield
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror or error}") from error
