"""Delivery in parts: of a file with several widths, a small file of one width that runs at once, and the rest.

The rest is a ZIP archive with ``parts.json``, which says what it belongs to, and what the back end of the format needs
to make the whole of both. The whole is, byte for byte, the file that was split: its hash is in the rest, so a result
that differs is never handed out. Needs neither torch, nor a runtime, nor the checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tqexport.artifacts.truncate import OpenArtifact
from tqexport.backends import backend_of
from tqexport.errors import InputError, about
from tqexport.facts import DAMAGED
from tqexport.reading import limits, records
from tqexport.reading.archives import read_archive
from tqexport.reading.files import read_bytes

__all__ = ["joined", "rest_of"]

_RECORD = "parts.json"
_SCHEMA = 1
_STORED = (1980, 1, 1, 0, 0, 0)  # the time of each member, so that the same file gives the same bytes


@dataclass(frozen=True)
class _Record:
    """What a rest says of itself.

    Attributes:
        schema_version: 1.
        file: Name of the file that was split.
        sha256: Its hash, hex.
        width: Bits of the first part.
        first_sha256: Its hash, hex.
    """

    schema_version: int
    file: str
    sha256: str
    width: int
    first_sha256: str


def rest_of(whole: OpenArtifact, first: bytes, bits: int) -> bytes:
    """The part of an artifact that its packed file of a width lacks.

    Args:
        whole: A file with several widths.
        first: Its packed file of a width, from :meth:`OpenArtifact.truncate`.
        bits: The width.

    Raises:
        UsageError: Files of the format have no such parts.
        InputError: The artifact was rewritten by another program.
    """
    with about(whole.name):
        members = whole.backend.remainder(whole.content, first, bits)
        if whole.backend.rejoined(first, members, bits) != whole.content:
            raise InputError("was rewritten since its export, so that its parts do not give it back; export it again")
    record = _Record(_SCHEMA, Path(whole.name).name, _sha256(whole.content), bits, _sha256(first))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in {_RECORD: json.dumps(asdict(record)).encode(), **members}.items():
            archive.writestr(zipfile.ZipInfo(name, _STORED), content, zipfile.ZIP_DEFLATED, 9)
    return stream.getvalue()


def joined(first: Path, rest: Path) -> tuple[str, bytes]:
    """The file that two parts were made of.

    Args:
        first: The packed file.
        rest: The archive.

    Returns:
        Its name, and its content.

    Raises:
        InputError: A part is missing or damaged, or the two do not belong together.
    """
    packed = read_bytes(first)
    with about(str(rest)):
        record, members = _read(read_bytes(rest))
    if _sha256(packed) != record.first_sha256:
        raise InputError(
            f"{first} is not the file of {record.width} bits that {rest} was made with (its sha256 differs), or it was "
            f"changed since; take the two files that one tqexport split wrote"
        )
    with about(str(rest)):
        content = backend_of(packed).rejoined(packed, members, record.width)
        if _sha256(content) != record.sha256:
            raise InputError(DAMAGED)
    return record.file, content


def _read(content: bytes) -> tuple[_Record, dict[str, bytes]]:
    """The record of a rest, and its other members by name."""
    members = read_archive(content, max(limits.SAMPLES_RATIO * len(content), limits.SAMPLES_SMALL))
    try:
        said = records.mapping(records.parse_json(members.pop(_RECORD)), _RECORD)
        record = _Record(
            records.whole(said["schema_version"], "schema_version", _SCHEMA, _SCHEMA),
            records.text(said["file"], "file"),
            records.text(said["sha256"], "sha256"),
            records.whole(said["width"], "width", 1, 7),
            records.text(said["first_sha256"], "first_sha256"),
        )
        if (
            said.keys() != asdict(record).keys()
            or Path(record.file).name != record.file
            or record.file in ("", "..")
            or "\0" in record.file
        ):
            raise InputError("it names no file, or says more than it should")
    except (KeyError, InputError) as error:
        raise InputError("is no rest that this tqexport split wrote; split the file again") from error
    return record, members


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
