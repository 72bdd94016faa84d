"""Commands on hostile files: whatever a file holds, no command ends with exit code 70."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path
from random import Random

import fuzz_onnx
import fuzz_tflite
from fuzz_checkpoint import READER as CHECKPOINT
from fuzz_research import READER as RESEARCH
from harness import ROOT, Reader
from mutators import mutated_bytes
from tqexport.cli import cli

__all__ = ["READER"]

_DATA = ROOT / "tests/data"


class _Commands(Reader):
    """A command line in each input; the folder of its files is the working folder."""

    name = "commands"

    @cached_property
    def folders(self) -> list[Path]:
        """Folders with right files: a checkpoint, its exports with their manifest, and two parts of one of them."""
        place = Path(tempfile.mkdtemp(prefix="tqexport-fuzz-"))
        shutil.copytree(_DATA / "v0.1", place / "research/out")
        shutil.copy(_DATA / "svhnq.pt", place / "research")
        shutil.copytree(_DATA / "v0.1-truncatable", place / "truncatable/out")
        shutil.copy(_DATA / "svhnq.pt", place / "truncatable")
        for kernel, checkpoint in (("exact", "digits-resnet8"), ("integer", "digits-resnet8-int")):
            folder = place / kernel
            folder.mkdir()
            shutil.copy(ROOT / f"fixtures/{checkpoint}.pt", folder / "ckpt.pt")
            _run("onnx", folder / "ckpt.pt", "--bits", "2", "-o", folder / "out")
            _run("onnx", folder / "ckpt.pt", "--bits", "runtime", "-o", folder / "out")
        _run("split", place / "exact/out/ckpt.onnx", "-o", place / "exact/out")
        _run("c", place / "integer/ckpt.pt", "--bits", "2", "-o", place / "integer/out")
        _run("tflite", place / "integer/ckpt.pt", "--bits", "2", "-o", place / "integer/out")
        return sorted(place.iterdir())

    def write(self, folder: Path, random: Random) -> Path:
        right = random.choice(self.folders)
        shutil.copytree(right, folder, dirs_exist_ok=True)
        places = [path for path in sorted(folder.rglob("*")) if path.suffix in _COMMANDS]
        changed = random.choice(places)
        changed.write_bytes(_mutated(changed, random))
        _enter(changed)
        self._command = [str(part) for part in random.choice(_COMMANDS[changed.suffix])(changed, random)]
        return folder

    def read(self, path: Path) -> None:  # noqa: ARG002 - the command names what it reads
        _run(*self._command)


def _run(*arguments: object) -> None:
    """A command, without what it prints."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli.main([str(argument) for argument in arguments], prog_name="tqexport", standalone_mode=False)


def _mutated(path: Path, random: Random) -> bytes:
    """A hostile file in the place of a right one."""
    content = path.read_bytes()
    match path.suffix:
        case ".onnx":
            return fuzz_onnx.with_odd_field(content, random)  # most others are refused as soon as they are opened
        case ".tflite":
            return fuzz_tflite.with_odd_field(content, random)
        case ".pt":
            reader = RESEARCH if path.name == "svhnq.pt" else CHECKPOINT
            with tempfile.TemporaryDirectory() as place:
                return reader.write(Path(place), random).read_bytes()
    return mutated_bytes(content, random)


def _enter(path: Path) -> None:
    """Let the manifest beside a file, or in the folder of exports beside it, say the hash that it has now."""
    content = path.read_bytes()
    for place in (path.parent / "tqexport.json", path.parent / "out/tqexport.json"):
        if place.is_file() and place != path:
            manifest = json.loads(place.read_text())
            digest = hashlib.sha256(content).hexdigest()
            if path.suffix == ".pt":
                manifest["checkpoint_sha256"] = digest
            for entry in manifest["artifacts"]:
                if entry["file"] == path.name:
                    entry.update(sha256=digest, bytes=len(content))
            place.write_text(json.dumps(manifest))


Command = list[object]


def _inspect(path: Path, _random: Random) -> Command:
    return ["inspect", path, "--json"]


def _truncate(path: Path, random: Random) -> Command:
    return ["truncate", path, "-o", path.parent / "cut", *(["--packed"] if random.random() < 0.5 else [])]


def _split(path: Path, random: Random) -> Command:
    return ["split", path, "--first", random.choice((1, 2, 4)), "-o", path.parent / "parts"]


def _join(path: Path, _random: Random) -> Command:
    return [
        "join",
        path.parent / "ckpt-w2-exact-packed.onnx",
        path.parent / "ckpt-w2-rest.zip",
        "-o",
        path.parent / "x",
    ]


def _verify(path: Path, random: Random) -> Command:
    folder = path.parent if path.parent.name == "out" else path.parent / "out"
    bits = next((bits for bits in (4, 8) if list(folder.glob(f"svhnq-w{bits}.onnx"))), 2)
    runtime = "litert" if path.suffix == ".tflite" and random.random() < 0.3 else "onnxruntime"
    return ["verify", folder, "--runtime", runtime, "--bits", bits, "--samples", "2", "--json"]


def _verify_pair(path: Path, random: Random) -> Command:
    others = sorted(other for other in path.parent.iterdir() if other.suffix in (".onnx", ".tflite"))
    pair: Command = [path, random.choice(others)]
    random.shuffle(pair)
    named = re.search(r"-w(\d)", "".join(map(str, pair)))
    return ["verify", *pair, "--bits", named[1] if named else "4", "--samples", "2"]


def _convert(path: Path, random: Random) -> Command:
    return ["tflite", path.parent, *(["--bits", "runtime"] if random.random() < 0.2 else [])]


# Those that load a checkpoint or convert take seconds, so they are few.
_ARTIFACT: list[Callable[[Path, Random], Command]] = [*[_inspect, _truncate, _verify_pair] * 4, _verify]
_COMMANDS: dict[str, list[Callable[[Path, Random], Command]]] = {
    ".onnx": [*_ARTIFACT, *[_split, _join] * 2, _convert],
    ".tflite": _ARTIFACT,
    ".c": [*[_inspect] * 9, _verify],
    ".pt": [*[_inspect] * 9, _verify],
    ".zip": [_join],
    ".json": [_verify, _convert],
}

READER = _Commands()
