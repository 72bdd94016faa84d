"""A trial of a command, of two exports at once, and of a checkpoint that is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from random import Random

from checks import (
    check_files,
    differ,
    hashes,
    is_input,
    require,
    sha256,
    temporary,
    wait_for_children,
    without,
)
from command_lines import COMMANDS
from processes import end_before_operation, end_of, run, said, start
from workplace import Workplace, fresh, trace_anew

from tqexport.artifacts.manifest import read_artifact, read_manifest

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
SMALLEST_LIMIT = 4096  # bytes, so that what a command says still fits in a file


def trial(place: Workplace, name: str, random: Random, kind: str) -> str:
    """One disturbed run of a command, and one after it; returns what became of the first."""
    command = COMMANDS[name]
    folder = fresh(place, name)
    wanted, previous = place.wanted[name], place.previous[name]
    inputs = {file: sha256 for file, sha256 in previous.items() if is_input(file)}
    by, moment, setup = random.choice(SIGNALS), None, lambda: None
    if kind == "clock":
        moment, setup = random.uniform(0, 1.05 * place.seconds[name]), trace_anew
    elif kind == "operation":
        number = random.randint(1, place.operations[name])
        setup = lambda: end_before_operation(number, by)  # noqa: E731
    else:
        limit = random.randint(SMALLEST_LIMIT, max(SMALLEST_LIMIT, place.largest[name]))
        setup = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    process = start(folder, command.line, setup)
    if moment is not None:
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, by)
    code = end_of(process)
    words = said(folder)
    check_files(folder, wanted, previous, inputs)
    require("Traceback" not in words, f"it prints a traceback: {words[-300:]}")
    if code != -signal.SIGKILL:
        expected = {0, 4} if kind == "disk" else {0, 128 + by, -by}  # -by: before the command took the signal over
        require(code in expected, f"exit code {code}: {words[-300:]}")
        require(code < 0 or not temporary(folder), f"{temporary(folder)} is left after exit code {code}")
        if code > 0:
            require(len(words.strip().splitlines()[-1:]) == 1, "it does not say why")
    if command.starts:
        wait_for_children(folder)
    again = run(folder, command.line)
    require(again == 0, f"run again, it ends with {again}: {said(folder)[-300:]}")
    require(without(hashes(folder)) == without(wanted), f"run again, it gives other files: {differ(folder, wanted)}")
    require(not temporary(folder), f"{temporary(folder)} is left after the next run")
    return {0: "completed", -signal.SIGKILL: "killed"}.get(code, f"exit code {code}")


def two_at_once(place: Workplace, random: Random) -> str:
    """Two exports into one folder at once: the manifest has both."""
    folder = fresh(place, None)
    widths = [sorted(random.sample(range(1, 9), 2)) for _ in range(2)]
    lines = [f"onnx ckpt.pt --bits {','.join(map(str, own))} -o out" for own in widths]
    processes = []
    for number, line in enumerate(lines):
        processes.append(start(folder, line, log=f"said{number}"))
        time.sleep(random.uniform(0, 0.1))
    for number, process in enumerate(processes):
        code = end_of(process)
        require(code == 0, f"exit code {code}: {said(folder, f'said{number}')}")
    manifest = read_manifest(folder / "out")
    have = {bits for artifact in manifest.artifacts for bits in artifact.widths}
    require(have == {*widths[0], *widths[1]}, f"the manifest has {have} of {widths}")
    for artifact in manifest.artifacts:
        read_artifact(folder / "out", artifact)
    require(not temporary(folder), f"{temporary(folder)} is left")
    return "both"


def replaced(place: Workplace, random: Random) -> str:
    """A checkpoint replaced while it is exported: the exports are of one or the other, and say of which."""
    folder = fresh(place, None)
    line, whole = "onnx ckpt.pt --bits 4,8 -o out", random.random() < 0.5
    process = start(folder, line, trace_anew)
    time.sleep(random.uniform(0, random.choice((0.1, 1.0)) * place.seconds_of_export))  # it is read at the beginning
    content = (folder / "other.pt").read_bytes()
    if whole:
        (folder / "new.pt").write_bytes(content)
        (folder / "new.pt").rename(folder / "ckpt.pt")
    else:
        with (folder / "ckpt.pt").open("r+b") as stream:  # in place, in two steps, as copying does
            stream.write(content[: len(content) // 2])
            stream.flush()
            time.sleep(random.uniform(0, 0.02))
            stream.write(content[len(content) // 2 :])
            stream.truncate()
    code = end_of(process)
    require(code in (0, 3), f"exit code {code}: {said(folder)}")
    require(len(said(folder).strip().splitlines()) == 1 or code == 0, f"more than a sentence: {said(folder)}")
    if code == 0:
        manifest = read_manifest(folder / "out")
        for artifact in manifest.artifacts:
            read_artifact(folder / "out", artifact)
        of = [
            name
            for name in ("start/ckpt.pt", "start/other.pt")
            if sha256(place.root / name) == manifest.checkpoint_sha256
        ]
        require(len(of) == 1, "the manifest is of neither checkpoint")
        facts = {json.dumps(str(path)): path.read_bytes() for path in (folder / "out").glob("*.onnx")}
        require(all(manifest.checkpoint_sha256.encode() in c for c in facts.values()), "files of another checkpoint")
    require(run(folder, line) == 0, f"run again, it fails: {said(folder)}")
    require(
        read_manifest(folder / "out").checkpoint_sha256 == sha256(folder / "ckpt.pt"), "run again, it is the old one"
    )
    return f"exit code {code}"
