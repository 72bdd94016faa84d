"""A Cortex-M4 in an emulator: the board mps2-an386 in QEMU, programs by arm-none-eabi-gcc with newlib."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ABSENT", "cross_compile", "emulate", "section_sizes"]

COMPILER, EMULATOR, SIZE = "arm-none-eabi-gcc", "qemu-system-arm", "arm-none-eabi-size"
TARGET = ("-mcpu=cortex-m4", "-mthumb", "-std=c99")
START = Path(__file__).parents[1] / "device"

_MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
ABSENT = (  # why nothing can be tried here; empty where it can
    f"{' and '.join(_MISSING)} not found; Debian has them as gcc-arm-none-eabi, libnewlib-arm-none-eabi and "
    "qemu-system-arm"
    if _MISSING
    else ""
)


def cross_compile(folder: Path, sources: Sequence[str], program: str, flags: Sequence[str] = ()) -> Path:
    """Compile at -O3 and link C files for the board."""
    link = ["--specs=rdimon.specs", "-nostartfiles", "-T", START / "mps2_an386.ld", "-Wl,--gc-sections"]
    command = [COMPILER, *TARGET, "-O3", *flags, *link, "-o", program, *sources, START / "start.s"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return folder / program


def emulate(program: Path, *options: str, seconds: float = 300) -> str:
    """Run a program on the board; what it printed."""
    command = [EMULATOR, "-M", "mps2-an386", "-cpu", "cortex-m4", "-display", "none", "-monitor", "none"]
    command += ["-serial", "none", "-semihosting-config", "enable=on,target=native", *options, "-kernel", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    return done.stdout


def section_sizes(folder: Path, source: str) -> dict[str, int]:
    """Bytes of each section of a C file's object for the board at -Os: ``.text``, ``.rodata``, ``.bss``."""
    subprocess.run([COMPILER, *TARGET, "-Os", "-c", source, "-o", "sized.o"], cwd=folder, check=True)
    printed = subprocess.run([SIZE, "-A", "sized.o"], cwd=folder, capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"^(\.\w+)\s+(\d+)", printed, re.MULTILINE)}
