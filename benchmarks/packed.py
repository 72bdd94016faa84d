"""Packed files beside plain ones: their sizes, and what they cost where they run.

python benchmarks/packed.py --network digits     in TFLite Micro, the network of fixtures/digits-resnet8-int.pt
python benchmarks/packed.py --network resnet8    MLPerf Tiny's, with random weights in the bell shape of trained ones
python benchmarks/packed.py --network resnet20x5 --runtime onnxruntime    also litert; also resnet50, mobilenet, ...

For TFLite Micro, whether the file equals the integer model, and the arena that the recording allocator counts after a
run, on a host of 64 bits, whose pointers are twice as long as a microcontroller's. For onnxruntime, and LiteRT with
XNNPACK, how far the outputs are from those of the plain file, as a share of the largest; and how long loading and a run
of one sample take on one thread, as medians of the ratios of neighbouring measurements, with smallest and largest.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from tqexport import TruncModel, load_checkpoint
from tqexport.backends.base import EXACT_PACKED
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.file import parse
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.packing import pack_onnx
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.running import Session
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.half_bytes import PLAIN_KERNELS, pack_tflite
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.backends.tflite.integer_runtime import open_integer_runtimes
from tqexport.backends.tflite.layout import to_channels_last
from tqexport.backends.tflite.micro import check_micro
from tqexport.backends.tflite.packing import unpacked_filters
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.names import INTEGER, PACKED

FIXTURES = Path(__file__).parents[1] / "fixtures"
INTEGER_BENCHMARK = runpy.run_path(str(Path(__file__).with_name("integer.py")))
NETWORKS = tuple(INTEGER_BENCHMARK["NETWORKS"])
WIDTHS = (1, 2, 4, 6)
LATENCY_RUNS = 5
SAMPLES = 16
ARENA = 64 << 20  # bytes; more than any of the networks needs


def network(name: str, *, grids: bool = True) -> TruncModel:
    """A network, calibrated or not."""
    if name == "digits":
        return load_checkpoint(FIXTURES / f"digits-resnet8{'-int' * grids}.pt")
    model: TruncModel = INTEGER_BENCHMARK["network"](name, (*WIDTHS, 8))
    return calibrate(model, samples_of(model)) if grids else model


def samples_of(model: TruncModel) -> npt.NDArray[np.float32]:
    """Random samples, float32 (N, *input_shape)."""
    return np.random.default_rng(0).random((SAMPLES, *model.info.input_shape), np.float32)


def arena(content: bytes) -> int:
    """Bytes of the arena that TFLite Micro used for a run."""
    from tflite_micro.python.tflite_micro import runtime

    interpreter: Any = runtime.Interpreter.from_bytes(content, arena_size=ARENA)
    details = interpreter.get_input_details(0)
    interpreter.set_input(np.zeros(details["shape"], details["dtype"]), 0)
    interpreter.invoke()
    with tempfile.TemporaryFile() as said:  # the allocator writes to the process's standard error
        saved = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            interpreter.print_allocations()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        said.seek(0)
        (total,) = re.findall(rb"Arena allocation total (\d+) bytes", said.read())
    return int(total)


def equal(model: TruncModel, bits: int, content: bytes) -> bool:
    """Whether TFLite Micro gives the integer model's outputs for every sample."""
    integers, inputs = integer_model(model, bits), samples_of(model)
    (runtime,) = open_integer_runtimes(content, integers, ("tflm",))
    outputs = runtime.run_untouched(inputs)
    return not runtime.differing and np.array_equal(outputs, integers.run(inputs, "tflm")[integers.output])


@dataclass(frozen=True)
class Pair:
    """A packed file and the plain one."""

    bits: int
    kernel: str
    packed: bytes
    plain: bytes


def onnx_pairs(name: str) -> Iterator[Pair]:
    """ONNX files of both kernels."""
    exact = dict(export_onnx(network(name, grids=False), WIDTHS[:3]))
    integers = network(name)
    for bits, plain in exact.items():
        yield Pair(bits, EXACT_PACKED, pack_onnx(plain), plain)
        plain = integer_onnx(integers, bits)
        yield Pair(bits, PACKED, pack_onnx(plain), plain)


def tflite_pairs(name: str) -> Iterator[Pair]:
    """TFLite files of the exact and the dynamic kernel."""
    models = [parse(content) for _, content in export_onnx(network(name, grids=False), WIDTHS[:2])]
    for packed_kernel, kernel in PLAIN_KERNELS.items():
        for bits, plain in zip(WIDTHS[:2], convert_to_tflite(models, kernel), strict=True):
            yield Pair(bits, packed_kernel, pack_tflite(plain), plain)


def in_runtime(name: str, runtime: str, rounds: int) -> Table:
    """A row for each width and kernel: sizes, loading and latency of the packed file against the plain one."""
    columns = ("bits", "kernel", "plain, bytes", "packed", "loading", "latency", "apart")
    table = Table(*columns, title=f"{name}, {runtime}")
    pairs, session_of = PAIRS[runtime]
    shape = network(name, grids=False).info.input_shape
    sample = np.random.default_rng(0).random((1, *shape), np.float32)
    if runtime == "litert":
        sample = to_channels_last(sample)
    for pair in pairs(name):
        contents = (pair.packed, pair.plain)
        sessions = [session_of(content) for content in contents]
        loading = ratios([functools.partial(session_of, content) for content in contents], rounds, 1)
        latency = ratios([functools.partial(session.run, (sample,)) for session in sessions], rounds, LATENCY_RUNS)
        one, other = (session.run((sample,))[0] for session in sessions)
        apart = float(np.abs(one - other).max() / np.abs(other).max())
        sizes = (f"{len(content):,}" for content in reversed(contents))
        table.add_row(str(pair.bits), pair.kernel, *sizes, loading, latency, f"{apart:.0e}" if apart else "0")
    return table


PAIRS: dict[str, tuple[Callable[[str], Iterator[Pair]], Callable[[bytes], Session]]] = {
    "onnxruntime": (onnx_pairs, OnnxSession),
    "litert": (tflite_pairs, LiteRTSession),
}


def ratios(pair: Sequence[Callable[[], object]], rounds: int, runs: int) -> str:
    """How much longer the first of two takes than the second, in turns: median, smallest and largest."""
    found = []
    for _ in range(rounds + 1):
        taken = []
        for run in pair:
            start = time.perf_counter()
            for _ in range(runs):
                run()
            taken.append(time.perf_counter() - start)
        found.append(taken[0] / taken[1])
    of_warm = found[1:]
    return f"{statistics.median(of_warm):.2f} ({min(of_warm):.2f}-{max(of_warm):.2f})"


@click.command()
@click.option("--network", "name", type=click.Choice(["digits", *NETWORKS]), default="digits", show_default=True)
@click.option("--runtime", type=click.Choice(["tflm", *PAIRS]), default="tflm", show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Measurements of each pair of files.")
def main(name: str, runtime: str, rounds: int) -> None:
    """Print a row for each width and form."""
    if runtime in PAIRS:
        Console(width=110).print(in_runtime(name, runtime, rounds))
        return
    check_micro()
    model = network(name)
    table = Table("bits", "form", "file, bytes", "filters packed", "arena, bytes", "equal", title=name)
    for bits in WIDTHS:
        for kernel in (INTEGER, PACKED):
            content = integer_tflite(model, bits, kernel)
            packed = len(unpacked_filters(FlatModel(content)))
            row = (str(bits), kernel, f"{len(content):,}", str(packed), f"{arena(content):,}")
            table.add_row(*row, "yes" if equal(model, bits, content) else "NO")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
