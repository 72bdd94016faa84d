"""Size and arena of packed integer files in TFLite Micro beside plain ones; whether they equal the integer model.

python benchmarks/packed.py --network digits     the network of fixtures/digits-resnet8-int.pt
python benchmarks/packed.py --network resnet8    MLPerf Tiny's, with random weights in the bell shape of trained ones

The arena is what TFLite Micro's recording allocator says after a run, on a host of 64 bits, whose pointers are twice as
long as a microcontroller's.
"""

from __future__ import annotations

import os
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from tqexport import TruncModel, load_checkpoint
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.backends.tflite.integer_runtime import open_integer_runtimes
from tqexport.backends.tflite.micro import check_micro
from tqexport.backends.tflite.packing import unpacked_filters
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.names import INTEGER, PACKED

FIXTURE = Path(__file__).parents[1] / "fixtures" / "digits-resnet8-int.pt"
WIDTHS = (1, 2, 4, 6)
SAMPLES = 16
ARENA = 64 << 20  # bytes; more than any of the networks needs


def network(name: str) -> TruncModel:
    """A calibrated network."""
    if name == "digits":
        return load_checkpoint(FIXTURE)
    random = runpy.run_path(str(Path(__file__).with_name("integer.py")))["network"]
    model: TruncModel = random(name, (*WIDTHS, 8))
    return calibrate(model, samples_of(model))


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


@click.command()
@click.option("--network", "name", type=click.Choice(["digits", "resnet8"]), default="digits", show_default=True)
def main(name: str) -> None:
    """Print a row for each width and form."""
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
