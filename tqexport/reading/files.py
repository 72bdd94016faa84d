"""Opening files from strangers: ordinary ones, of a size that memory bears."""

from __future__ import annotations

from pathlib import Path

from tqexport.errors import InputError
from tqexport.reading import limits

__all__ = ["read_bytes"]


def read_bytes(path: Path, most: int = limits.FILE_BYTES) -> bytes:
    """The content of a file.

    Args:
        path: The file; a device or a pipe, which may never end, is none.
        most: Bytes that it may have.

    Raises:
        InputError: It is missing, no ordinary file, too large, or cannot be read.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is no ordinary file; name one")
        if (size := path.stat().st_size) > most:
            raise InputError(f"{path} has {size:,} bytes, more than {most:,}; is it the right file?")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the path holds a zero
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
