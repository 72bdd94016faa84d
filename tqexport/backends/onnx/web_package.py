"""onnxruntime-web, which runs ONNX files in browsers and in Node: found on this machine, or fetched with npm.

It is a package of npm and too large to be delivered with tqexport: 14 MB. Of its 140 MB three files are needed, those
that run on the processor on one thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqexport.errors import HostError, UsageError
from tqexport.files import ensure_folder, temporary_folder, write_bytes

__all__ = ["ENVIRONMENT", "GLUE", "MODULE", "VERSION", "WASM", "WebPackage", "find_package"]

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
ENVIRONMENT = "TQEXPORT_ONNXRUNTIME_WEB"  # the variable that names a folder with a copy
MODULE, GLUE, WASM = "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"

_SHA256 = {  # of the files of VERSION; others are not kept, whoever delivered them
    MODULE: "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    GLUE: "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_SECONDS = 600  # that npm may take for 33 MB
_ADVICE = f"or name a copy of it with --onnxruntime-web or the variable {ENVIRONMENT}"


@dataclass(frozen=True)
class WebPackage:
    """The files of onnxruntime-web that run a file.

    Attributes:
        version: Its version.
        files: Content by name: :data:`MODULE`, :data:`GLUE` and :data:`WASM`.
        folder: Where they lie.
    """

    version: str
    files: Mapping[str, bytes]
    folder: Path


def find_package(named: Path | None = None) -> WebPackage:
    """onnxruntime-web as it was named, or from the user's cache folder, or fetched with npm into it.

    Args:
        named: A folder with a copy: the package itself, or a folder with ``node_modules``. None takes the one that
            the variable :data:`ENVIRONMENT` names, if it is set.

    Raises:
        UsageError: The folder holds no copy.
        HostError: There is no copy, and npm is absent or cannot fetch one.
    """
    if named is None and (variable := os.environ.get(ENVIRONMENT)):
        named = Path(variable)
    if named is not None:
        return _named(named)
    folder = _cache()
    files = {name: path.read_bytes() for name in _SHA256 if (path := folder / name).is_file()}
    if _digests(files) != _SHA256:
        files = _fetched()
        ensure_folder(folder)
        for name, content in files.items():
            write_bytes(folder / name, content)
    return WebPackage(VERSION, files, folder)


def _named(folder: Path) -> WebPackage:
    """A copy that the user named, whatever its version."""
    for package in (folder, folder / PACKAGE, folder / "node_modules" / PACKAGE):
        try:
            files = {name: (package / "dist" / name).read_bytes() for name in _SHA256}
            about = json.loads((package / "package.json").read_text(encoding="utf-8"))
            return WebPackage(str(about["version"]), files, package / "dist")
        except (OSError, ValueError, LookupError, TypeError):
            continue
    raise UsageError(f"{folder} holds no onnxruntime-web: there is no package.json with dist/{WASM} beside it")


def _cache() -> Path:
    """The folder of this version among what this user's programs keep."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tqexport" / f"{PACKAGE}-{VERSION}"


def _fetched() -> dict[str, bytes]:
    """The files from npm, which runs nothing of the package."""
    npm = shutil.which("npm")
    if npm is None:
        raise HostError(f"npm, which fetches onnxruntime-web, is not installed; install Node.js, {_ADVICE}")
    with temporary_folder() as place:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", str(place)]
        try:
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
                raise HostError(f"npm cannot fetch onnxruntime-web {VERSION} ({said[0].strip()}); try again, {_ADVICE}")
            (archive,) = place.glob("*.tgz")
            with tarfile.open(archive) as opened:
                members = {name: opened.extractfile(f"package/dist/{name}") for name in _SHA256}
                files = {name: member.read() for name, member in members.items() if member is not None}
        except (OSError, ValueError, LookupError, tarfile.TarError, subprocess.TimeoutExpired) as error:
            raise HostError(f"npm cannot fetch onnxruntime-web {VERSION} ({error}); try again, {_ADVICE}") from error
    if _digests(files) != _SHA256:
        raise HostError(f"npm delivers other files than those of onnxruntime-web {VERSION}; none was kept, {_ADVICE}")
    return files


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
