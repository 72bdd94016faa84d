"""Building and running what the C back end writes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tqexport.backends.c.companions import header, test_program
from tqexport.backends.c.source import Program, render_c
from tqexport.facts import ArtifactFacts, MultiWidthFacts
from tqexport.integer.model import IntegerModel
from tqexport.truncation import Scheme

__all__ = ["NO_GCC", "STRICT", "build", "render", "try_program", "write_program"]

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
NO_GCC = "" if shutil.which("gcc") else "gcc is not installed"  # why nothing can be compiled; empty where it can
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def render(networks: Sequence[IntegerModel], stem: str = "net") -> Program:
    """The C of some widths, which says nothing true of where it comes from."""

    def facts(bits: int) -> ArtifactFacts:
        return ArtifactFacts(bits, bits, bits, Scheme(), "test", "", "channels last", kernel="integer")

    if len(networks) == 1:
        return render_c(networks, stem, facts(networks[0].bits))
    by_width = {network.bits: facts(network.bits) for network in networks}
    return render_c(networks, stem, MultiWidthFacts(by_width, dict.fromkeys(by_width, "")))


def write_program(folder: Path, networks: Sequence[IntegerModel], inputs: np.ndarray, stem: str = "net") -> Program:
    """Write ``net.c``, ``net.h`` and ``net_test.c``."""
    program = render(networks, stem)
    (folder / f"{stem}.c").write_text(program.source)
    (folder / f"{stem}.h").write_text(header(networks, stem, program.arena_bytes))
    (folder / f"{stem}_test.c").write_text(test_program(networks, stem, inputs))
    return program


def build(folder: Path, *flags: str, compiler: str = "gcc", stem: str = "net") -> Path:
    """Compile and link; any warning is an error."""
    command = [compiler, *STRICT, *flags, "-o", "tried", f"{stem}_test.c", f"{stem}.c"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return folder / "tried"


def try_program(
    folder: Path, networks: Sequence[IntegerModel], inputs: np.ndarray, flags: Sequence[str] = SANITIZED
) -> str:
    """Write, compile (with gcc's sanitizers) and run; returns what the program printed, and fails if it failed."""
    write_program(folder, networks, inputs)
    done = subprocess.run([build(folder, *flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
    return done.stdout
