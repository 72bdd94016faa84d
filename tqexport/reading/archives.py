"""Zip archives, which PyTorch's files and NumPy's are: what they unpack to, and whether it is what was written."""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib

from tqexport.errors import InputError

__all__ = ["check_size", "has_checksums", "read_archive", "without_checksums"]

_DAMAGE = (  # what zipfile and the libraries below it raise of it
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError, ValueError),
    *(EOFError, OSError),
)


def check_size(archive: zipfile.ZipFile, most: int) -> None:
    """Refuse an archive that unpacks to more than ``most`` bytes.

    Raises:
        InputError: It does.
    """
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > most:
        raise InputError(f"is a compressed archive that unpacks to {unpacked:,} bytes; it may be made to harm")


def read_archive(content: bytes, most: int) -> dict[str, bytes]:
    """The parts of an archive that unpacks to at most ``most`` bytes, by name.

    Raises:
        InputError: It is damaged, or larger.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_size(archive, most)
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except _DAMAGE as error:
        raise InputError("is a damaged archive; copy it again, or make it anew") from error


def has_checksums(archive: zipfile.ZipFile) -> bool:
    """Whether the CRC-32 of the parts were computed; ``torch.serialization.set_crc32_options(False)`` writes zeros."""
    return any(entry.CRC for entry in archive.infolist())


def without_checksums(archive: zipfile.ZipFile) -> None:
    """Read the parts without comparing checksums."""
    for entry in archive.infolist():
        entry.CRC = None  # type: ignore[assignment] # for zipfile there is nothing to compare with then
