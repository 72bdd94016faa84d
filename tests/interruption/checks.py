"""What must hold of the files after a command was disturbed."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

from command_lines import GROWS, INPUTS, VARIES

from tqexport.artifacts.manifest import FILE_NAME, read_artifact, read_manifest
from tqexport.errors import InputError

OTHERS = (".ses",)  # what onnxruntime leaves among temporary files


class WrongError(Exception):
    """What does not hold."""


def require(holds: bool, text: str) -> None:
    """Raise :class:`WrongError` with a text where something does not hold."""
    if not holds:
        raise WrongError(text)


def check_files(folder: Path, wanted: dict[str, str], previous: dict[str, str], inputs: dict[str, str]) -> None:
    """Inputs as they were; every other file whole, of this run or of before; the manifest agrees or says what to do."""
    now = hashes(folder)
    for name, sha256 in inputs.items():
        require(now.get(name) == sha256, f"{name} was touched")
    for name, sha256 in now.items():
        if name in inputs or name.endswith(FILE_NAME):
            continue
        if name.endswith(VARIES):
            require((folder / name).read_text().rstrip().endswith("</html>"), f"{name} is half-written")
            continue
        if name.endswith(GROWS):
            whole = (folder.parent / "whole" / name).read_bytes()
            require(whole.startswith((folder / name).read_bytes()), f"{name} is no beginning of the whole")
            continue
        require(sha256 in (wanted.get(name), previous.get(name)), f"{name} is half-written")
    for manifest in folder.rglob(FILE_NAME):
        for artifact in read_manifest(manifest.parent).artifacts:
            try:
                read_artifact(manifest.parent, artifact)
            except InputError as error:
                require("export it again" in str(error) or "export again" in str(error), f"no advice: {error}")


def is_input(name: str) -> bool:
    """Whether a file is one that commands read."""
    return name.startswith(INPUTS)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 by name of every visible file; ``tmp`` is where temporary ones are."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.parts)
        and "tmp" not in path.relative_to(folder).parts
    }


def sha256(path: Path) -> str:
    """Hash of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporary(folder: Path) -> list[str]:
    """What is hidden or temporary in a folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if (path.name.startswith(".") or path.parent.name == "tmp") and path.name not in OTHERS
    )


def without(files: dict[str, str]) -> dict[str, str]:
    """Files without those that vary with the clock."""
    return {name: sha256 for name, sha256 in files.items() if not name.endswith(VARIES)}


def differ(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Names of the files that are not as wanted."""
    now = hashes(folder)
    return sorted(name for name in {*now, *wanted} if now.get(name) != wanted.get(name))


def wait_for_children(folder: Path) -> None:
    """Whatever a dead command had started ends within seconds."""
    for _ in range(100):
        working = []
        for entry in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if str(entry.readlink()).startswith(str(folder)):
                    working.append(entry.parent.name)
        if not working:
            return
        time.sleep(0.1)
    raise WrongError(f"processes {working} go on after the command that started them")
