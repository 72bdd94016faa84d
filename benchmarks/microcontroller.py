"""What the emitted C costs on a microcontroller: flash, memory, instructions; and its speed here against LiteRT.

python benchmarks/microcontroller.py --network resnet8

Flash (.text and .rodata) and memory (.bss) are those of the C file's object for a Cortex-M4 at -Os. Instructions, of
the same at -O3, are counted by QEMU (mps2-an386 with -icount shift=0, where every instruction takes a nanosecond, read
from SysTick: 40 instructions are one tick). The peers are the integer TFLite file of the same width: its size, the
smallest arena that TFLite Micro runs it in (host build, 64-bit pointers), and the time that LiteRT's reference kernels
take. Times are of one thread and gcc -O3; nothing but their ratios means anything. Weights are random, as none of these
depends on them.
"""

from __future__ import annotations

import ctypes
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import device
from c_programs import write_program

sys.path.insert(0, str(Path(__file__).parent))
from integer import Peer, measure, network

from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.grids import OFFSET
from tqexport.integer.model import IntegerModel

TINY = ("resnet8", "mobilenet", "ds_cnn", "autoencoder")
PUBLISHED = {"resnet8": 98_496, "mobilenet": 333_288, "ds_cnn": 53_936, "autoencoder": 276_976}  # bytes, MLPerf Tiny
WIDTHS = tuple(range(1, 9))
FIXED = (1, 2, 4, 8)
SAMPLES = 16
INSTRUCTIONS_PER_TICK = 40  # at 25 MHz and a nanosecond for each

COUNTING = """
#include "net.h"
#include <stdint.h>
#include <stdio.h>
#define REGISTER(address) (*(volatile uint32_t *)(uintptr_t)(address))
static int8_t input[NET_INPUT_BYTES], output[NET_OUTPUT_BYTES];
int main(void)
{
    uint32_t before;
    REGISTER(0xE000E014U) = 0xFFFFFFU;
    REGISTER(0xE000E018U) = 0;
    REGISTER(0xE000E010U) = 5;
    before = REGISTER(0xE000E018U);
    if (net_run(input, output, BITS)) {
        return 1;
    }
    printf("%lu\\n", (unsigned long)((before - REGISTER(0xE000E018U)) & 0xFFFFFFU));
    return 0;
}
"""


def on_device(folder: Path, networks: Sequence[IntegerModel]) -> tuple[int, int, int]:
    """Flash and memory in bytes, and instructions for one run at the narrowest width."""
    inputs = np.zeros((1, *networks[0].shapes["input"]), np.float32)
    write_program(folder, networks, inputs)
    sizes = device.section_sizes(folder, "net.c")
    (folder / "count.c").write_text(COUNTING)
    program = device.cross_compile(folder, ["count.c", "net.c"], "count.elf", [f"-DBITS={networks[-1].bits}U"])
    ticks = int(device.emulate(program, "-icount", "shift=0").strip())
    return sizes[".text"] + sizes[".rodata"], sizes[".bss"], INSTRUCTIONS_PER_TICK * ticks


def smallest_arena(path: Path) -> int:
    """The smallest arena in which TFLite Micro runs a file, in bytes, to 64 bytes."""
    script = "import sys; from tflite_micro.python.tflite_micro.runtime import Interpreter; "
    script += "Interpreter.from_file(sys.argv[1], arena_size=int(sys.argv[2]))"

    def runs(size: int) -> bool:  # in a process of its own, for it may crash in an arena that is too small
        command = [sys.executable, "-c", script, str(path), str(size)]
        return subprocess.run(command, capture_output=True).returncode == 0

    low, high = 0, 1 << 19
    while high - low > 64:
        middle = (low + high) // 2
        low, high = (low, middle) if runs(middle) else (middle, high)
    return high


def c_peer(name: str, folder: Path, networks: Sequence[IntegerModel], bits: int, x: np.ndarray) -> Peer:
    """The C of some widths as gcc -O3 makes it, run at one of them."""
    write_program(folder, networks, np.zeros((1, *networks[0].shapes["input"]), np.float32))
    library = folder / f"{re.sub(r'[^a-z0-9]', '', name)}.so"
    subprocess.run(["gcc", "-O3", "-shared", "-fPIC", "net.c", "-o", library], cwd=folder, check=True)
    run = ctypes.CDLL(str(library)).net_run
    output = np.zeros(int(np.prod(networks[0].shapes[networks[0].output])), np.int8)
    ends = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)) for array in (x, output)]
    return Peer(name, lambda: (run(*ends, bits), x, output))


def reference_peer(name: str, content: bytes, x: np.ndarray) -> Peer:
    """A TFLite file in LiteRT's reference kernels."""
    interpreter = Interpreter(
        model_content=content, num_threads=1, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
    )
    interpreter.allocate_tensors()
    detail = interpreter.get_input_details()[0]

    def run() -> None:
        interpreter.set_tensor(detail["index"], x.reshape(detail["shape"]))
        interpreter.invoke()

    return Peer(name, run)


@click.command()
@click.option("--network", "name", type=click.Choice(TINY), default="resnet8", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--least", default=0.1, show_default=True, help="Seconds that each measurement takes at least.")
def main(name: str, rounds: int, least: float) -> None:
    """Print bytes, instructions and ratios."""
    if device.ABSENT:
        raise click.ClickException(device.ABSENT)
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = network(name, WIDTHS, quantize_all=True)
    model = calibrate(model, np.random.default_rng(0).random((SAMPLES, *model.info.input_shape), np.float32))
    networks = {bits: integer_model(model, bits) for bits in WIDTHS}
    x = np.random.default_rng(0).random((1, *model.info.input_shape), np.float32)
    levels = networks[8].run(x)["input"].astype(np.int16) - OFFSET
    given = np.ascontiguousarray(np.moveaxis(levels, 1, -1) if levels.ndim > 2 else levels).astype(np.int8)
    table = Table("", "flash", "memory", "instructions", "TFLite file", "TFLM arena", "time / LiteRT reference")
    table.title = f"{name}; MLPerf Tiny's int8 file has {PUBLISHED[name]:,} bytes"
    with tempfile.TemporaryDirectory() as parent:
        rows: dict[str, list[str]] = {}
        peers: list[Peer] = []
        cases = [(f"{bits} bits", [networks[bits]], bits) for bits in FIXED]
        cases.append(("all eight widths, at 8 bits", list(networks.values()), 8))
        for label, own, bits in cases:
            folder = Path(parent, label)
            folder.mkdir()
            flash, memory, instructions = on_device(folder, own)
            rows[label] = [f"{flash:,}", f"{memory:,}", f"{instructions:,}"]
            peers.append(c_peer(label, folder, own, bits, given))
            if len(own) == 1:
                content = integer_tflite(model, bits)
                (folder / "net.tflite").write_bytes(content)
                rows[label] += [f"{len(content):,}", f"{smallest_arena(folder / 'net.tflite'):,}"]
                peers.append(reference_peer(f"{label}, reference", content, given))
            else:
                rows[label] += ["-", "-"]
        times = measure(peers, rounds, least)
    for label, row in rows.items():
        bits_label = f"{label}, reference" if f"{label}, reference" in times else "8 bits, reference"
        ratio = np.median(np.array(times[label]) / np.array(times[bits_label]))
        table.add_row(label, *row, f"{ratio:.2f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
