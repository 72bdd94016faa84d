"""Where the files lie that tests read, and folders that every worker of a parallel run shares."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["DATA", "DIGITS", "DIGITS_DATA", "DIGITS_INT", "ROOT", "artifact", "files", "made_once"]

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
DIGITS = ROOT / "fixtures" / "digits-resnet8.pt"
DIGITS_INT = ROOT / "fixtures" / "digits-resnet8-int.pt"  # calibrated
DIGITS_DATA = ROOT / "fixtures" / "digits-test.npz"


def artifact(folder: Path, kind: str, bits: int) -> bytes:
    """Content of a fixed file of the digits network, of the fixture ``exported`` or ``exported_once``."""
    return (folder / "out" / f"ckpt-w{bits}.{kind}").read_bytes()


def files(folder: Path) -> list[str]:
    """Names of all files in a folder and the folders in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker to ask for it fills, while the others wait.

    Args:
        factory: Of the worker.
        name: Of the folder.
        make: Fills it.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has its own below it
    folder = root / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = factory.mktemp(name)
            make(unfinished)
            unfinished.rename(folder)
    return folder
