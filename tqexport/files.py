"""Files written whole or not at all, and nothing left behind: what a killed run leaves, the next one removes.

Everything temporary is locked by the run that uses it (``flock``). The system takes the lock of a process that ends in
whatever way, so what is not locked belongs to nobody. Where there is no ``flock``, nothing of other runs is removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tqexport.errors import HostError, InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_path",
    "ensure_folder",
    "exclusive",
    "remove_folders_of_dead_runs",
    "remove_temporary",
    "sha256_of",
    "temporary_files_in",
    "temporary_folder",
    "write_bytes",
    "write_folder",
]

_TRIES, _SECONDS_BETWEEN = 50, 0.1  # to remove a folder
_SUFFIX = ".tqexport.tmp"
_TEMPORARY = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(_SUFFIX)}")
_PREFIX = "tqexport.tmp."  # of temporary folders
_TEMPORARY_FOLDER = re.compile(rf"{re.escape(_PREFIX)}[a-z0-9_]{{8}}")  # as tempfile names them

_own: set[Path] = set()  # what is temporary of this run: the names, before there is anything of them, until it is gone
_aside: dict[Path, Path] = {}  # folders whose place another is about to take, with that place


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that becomes ``target`` if the block succeeds, and is removed if not.

    Raises:
        HostError: The folder cannot be written, or the disk is full.
    """
    try:
        with _temporary_file(target.parent) as (temporary, descriptor):
            yield temporary
            os.fsync(descriptor)  # or a machine that stops may have the name and not the content
            temporary.replace(target)
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror or error}") from error


def write_bytes(target: Path, content: bytes) -> None:
    """Write ``content`` to ``target`` whole or not at all (see :func:`atomic_path`)."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder with these files and nothing else, whole or not at all, in the place of an earlier one.

    Args:
        target: The folder. What an earlier one holds is removed.
        files: Content by path in it.

    Raises:
        HostError: The folder beside it cannot be written, or the disk is full.
    """
    target = target.resolve()
    ensure_folder(target.parent)
    try:
        with _temporary_directory(target.parent) as made, _temporary_directory(target.parent) as earlier:
            for name, content in files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_bytes(content)
            try:
                if target.exists():
                    _aside[earlier] = target
                    target.rename(earlier)
                made.rename(target)
            finally:
                _put_back()
    except OSError as error:
        raise HostError(f"cannot write the folder {target}: {error.strerror or error}") from error


def ensure_folder(folder: Path) -> None:
    """Make sure that files can be written into ``folder``, before any slow work, and remove what dead runs left there.

    Raises:
        HostError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_file(folder):
            pass
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
                with suppress(FileNotFoundError):  # its run has just removed it
                    _remove_if_dead(path)
    except OSError as error:
        raise HostError(f"cannot write to the folder {folder}: {error.strerror or error}") from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """A block that one run at a time goes through, of all that work in ``folder``; the others wait.

    Raises:
        HostError: There is no such folder.
    """
    try:
        with _locked(folder):
            yield
    except OSError as error:
        raise HostError(f"cannot write to the folder {folder}: {error.strerror or error}") from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this run alone, removed with all that is in it; those of dead runs are removed first.

    Raises:
        HostError: It cannot be made or written.
    """
    remove_folders_of_dead_runs()
    try:
        with _new_folder(lambda: Path(tempfile.gettempdir(), f"{_PREFIX}{secrets.token_hex(4)}"), 0o700) as path:
            yield path
    except OSError as error:
        raise HostError(f"cannot write a temporary file: {error.strerror or error}") from error


def remove_folders_of_dead_runs() -> None:
    """Remove what runs that were killed left of :func:`temporary_folder`."""
    folders: list[Path] = []
    with suppress(OSError):  # there is no place for temporary files
        folders += Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")
    for path in folders:
        with suppress(OSError):  # it is somebody else's, or gone
            if _TEMPORARY_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                _remove_if_dead(path)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """A block in which all that this process and those that it starts keep temporarily is in ``folder``.

    So what a library leaves behind when it is killed goes with the folder.
    """
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable


def remove_temporary() -> None:
    """Remove what is temporary of this run, which is about to end without leaving the blocks that it is in."""
    _put_back()
    for path in [*_own]:
        with suppress(OSError):  # the next run removes what cannot be removed now
            if path.is_dir():
                _remove_folder(path)
            else:
                path.unlink(missing_ok=True)


def _put_back() -> None:
    """Give folders that were put aside their names back, where nothing new has these."""
    for aside, target in [*_aside.items()]:
        if not target.exists():
            with suppress(OSError):
                aside.rename(target)
        _aside.pop(aside, None)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _temporary_file(folder: Path) -> Iterator[tuple[Path, int]]:
    """A new file that is locked, and its descriptor; it is removed if it still has its name."""
    while True:
        path, descriptor = folder / f".{secrets.token_hex(4)}{_SUFFIX}", None
        _own.add(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            _lock(descriptor)
            if path.exists():  # another run may have taken it for a dead one's before it was locked
                yield path, descriptor
                return
        finally:
            path.unlink(missing_ok=True)
            _own.discard(path)
            if descriptor is not None:
                os.close(descriptor)


@contextmanager
def _temporary_directory(folder: Path) -> Iterator[Path]:
    """A new folder in another that is locked; whatever has its name at the end is removed."""
    with _new_folder(lambda: folder / f".{secrets.token_hex(4)}{_SUFFIX}", 0o777) as path:
        yield path


@contextmanager
def _new_folder(name: Callable[[], Path], mode: int) -> Iterator[Path]:
    """A new folder that is locked."""
    while True:
        path = name()
        _own.add(path)
        try:
            path.mkdir(mode)
            with _locked(path):
                if path.is_dir():  # another run may have taken it for a dead one's before it was locked
                    yield path
                    return
        finally:
            _remove_folder(path)
            _own.discard(path)


def _remove_folder(path: Path) -> None:
    """Remove a folder that a process which was just told to end may still write to."""
    for _ in range(_TRIES):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(_SECONDS_BETWEEN)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A folder that is locked, once nobody else has locked it."""
    if not fcntl:  # and no opening of folders
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _remove_if_dead(path: Path) -> None:
    """Remove a temporary file or folder of this user that no run has locked."""
    if not fcntl or path.stat().st_uid != os.getuid():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _lock(descriptor, wait=False):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file or folder; False where another run has it, or the file system has no locks."""
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return fcntl is not None
