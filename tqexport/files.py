"""Files written whole or not at all."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqexport.errors import HostError

__all__ = ["atomic_path", "ensure_folder", "sha256_of", "write_bytes"]


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that becomes ``target`` if the block succeeds, and is removed if not.

    Raises:
        HostError: The folder cannot be written, or the disk is full.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, content: bytes) -> None:
    """Write ``content`` to ``target`` whole or not at all (see :func:`atomic_path`)."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def ensure_folder(folder: Path) -> None:
    """Make sure that files can be written into ``folder``, before any slow work.

    Raises:
        HostError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HostError(f"cannot write to the folder {folder}: {error.strerror or error}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
