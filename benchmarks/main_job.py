"""What an export costs, as ratios against what everybody else's tools give for the same network in the same run.

python benchmarks/main_job.py                            the bundled ResNet-8
python benchmarks/main_job.py --network resnet20x5       random weights, for the sizes and times of a real network
python benchmarks/main_job.py --kernel dynamic           the files for integer kernels, against TensorFlow's own

Measured per width: bytes of each artifact; onnxruntime and LiteRT latency, and the time a conversion takes. The peer
is the plain float32 network: ordinary torch modules, torch.onnx.export, the onnx2tf command line.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from ai_edge_litert.interpreter import Interpreter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tqexport import ActivationQuantizer, CheckpointInfo, TruncModel, at_width, load_checkpoint, save_checkpoint
from tqexport.networks.registry import find_factory
from tqexport.training.layers import switchable_batch_norms
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import FLOAT_BITS, max_code

FIXTURE = Path(__file__).parent.parent / "fixtures" / "digits-resnet8.pt"
# onnx2tf downloads this file when an input looks like an image and it is not in the working folder.
CALIBRATION = "calibration_image_sample_data_20x128x128x3_float32.npy"
AGREEMENT = 1e-3  # of the largest output
FLIPPED_AGREEMENT = 2e-2  # at most, where no input is free of flips; half a code wrong is 7e-2 and more
ATTEMPTS = 10  # inputs to try: with many activations at few bits most inputs hold a flip, but not all of them
MEASUREMENT_SECONDS = 0.2
CONVERSION = "conversion to TFLite"

Array = npt.NDArray[np.float32]
Run = Callable[[], object]


@dataclass(frozen=True)
class Network:
    """A registered architecture, to be built with random weights."""

    factory: str
    arguments: dict[str, Any]
    input_shape: tuple[int, ...]
    batch: int  # how many samples the BatchNorm statistics come from


NETWORKS = {
    "resnet20x5": Network("resnet20q", {"expansion": 5}, (3, 32, 32), 64),
    "resnet50": Network("resnet50q", {}, (3, 224, 224), 8),
    "mobilenet": Network("mobilenet", {}, (3, 96, 96), 32),
    "ds_cnn": Network("ds_cnn", {}, (1, 49, 10), 64),
}


@dataclass(frozen=True)
class Size:
    """Bytes of one artifact, and of the float32 file of the same kind."""

    bits: int
    kind: str
    bytes: int
    ideal: int
    excess: int
    ratio: float
    float_bytes: int


@dataclass(frozen=True)
class Timing:
    """Time of ours against the peer: seconds, and ratios of measurements taken one right after the other."""

    what: str
    bits: str  # one width, or several with commas
    ours: float
    peer: float
    ratio: float
    lowest: float
    highest: float
    pairs: int
    goal: float


@dataclass(frozen=True)
class Agreement:
    """How far apart ours and the peer are on one input, as a share of the largest output."""

    runtime: str
    bits: int
    error: float
    allowed: float
    inputs_tried: int


class PlainActivation(nn.Module):
    """The activation quantiser as anybody would write it."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = float(max_code(bits))

    def forward(self, x: Tensor) -> Tensor:
        """float32 of any shape; returns the same shape."""
        return (x.clamp(0, 1) * self.levels).round() / self.levels


def plain_network(model: TruncModel, bits: int) -> nn.Module:
    """The reference network at one width, of nothing but ordinary float32 modules."""
    with model.at_width(bits) as reference:
        replaced: dict[int, nn.Module] = {}
        for weight in quantized_weights(reference).values():
            plain = copy.deepcopy(weight.module)
            parametrize.remove_parametrizations(plain, weight.parameter)  # leaves the quantised weight
            replaced[id(weight.module)] = plain
        for norm in switchable_batch_norms(reference).values():
            replaced[id(norm)] = copy.deepcopy(norm.current)
        for module in reference.modules():
            if isinstance(module, ActivationQuantizer):
                replaced[id(module)] = nn.ReLU() if module.bits == FLOAT_BITS else PlainActivation(module.bits)
        # deepcopy takes the replacement wherever the memo names the original
        copied: nn.Module = copy.deepcopy(reference, replaced)
    return copied.eval()


def ideal_bytes(model: TruncModel, plain: nn.Module) -> int:
    """One byte per quantised weight and four per other parameter; running statistics are not counted."""
    quantized = sum(weight.original.numel() for weight in quantized_weights(model.module).values())
    everything = sum(parameter.numel() for parameter in plain.parameters())
    return quantized + 4 * (everything - quantized)


def export_plain(plain: nn.Module, input_shape: tuple[int, ...], path: Path) -> None:
    """torch.onnx.export as it comes, with the free batch that our files have."""
    batch = torch.export.Dim("batch")
    sample = torch.zeros((2, *input_shape))
    program = torch.onnx.export(plain, (sample,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(str(path), external_data=False)  # one file, so that copying it is enough


def write_random(network: Network, widths: tuple[int, ...], path: Path) -> None:
    """A checkpoint of a network with random weights, and the BatchNorm statistics that belong to them."""
    torch.manual_seed(0)
    arguments = {**network.arguments, "widths": list(widths)}
    module: nn.Module = find_factory(network.factory)(**arguments)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # the statistics of one batch, without what was there before
    images = torch.randn((network.batch, *network.input_shape))
    module.train()
    for bits in widths:
        with torch.no_grad(), at_width(module, bits):
            module(images)
    save_checkpoint(path, module.eval(), CheckpointInfo(network.factory, arguments, network.input_shape, widths))


def onnx_runner(path: Path) -> tuple[Callable[[Array], Array], Callable[[Array], Run]]:
    """(what a file computes of an input, the call to measure on an input): onnxruntime's defaults on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0], lambda x: lambda: session.run(None, {name: x})


def tflite_runner(path: Path) -> tuple[Callable[[Array], Array], Callable[[Array], Run]]:
    """The same for LiteRT. Inputs are channels first here too."""
    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=1)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def prepare(x: Array) -> Run:
        interpreter.set_tensor(source, np.ascontiguousarray(np.moveaxis(x, 1, -1)))
        invoke: Run = interpreter.invoke
        return invoke

    def compute(x: Array) -> Array:
        prepare(x)()
        result: Array = interpreter.get_tensor(target)
        return result

    return compute, prepare


def check_agreement(
    runtime: str, bits: int, shape: tuple[int, ...], ours: Callable[[Array], Array], peer: Callable[[Array], Array]
) -> Agreement:
    """Make sure that what is timed computes the same.

    Two correct runs differ where an activation sits on a rounding boundary, and that grows on its way to the output.
    Other functions differ on every input, so one without such a flip settles it. Where every input has one, as in deep
    networks at 8 bits, the outputs may be as far apart as a millionth of the input moves those of the peer.

    Raises:
        ClickException: They differ on every input tried.
    """
    generator = np.random.default_rng(0)
    smallest, moved = float("inf"), 0.0
    for attempt in range(1, ATTEMPTS + 1):
        x = generator.standard_normal((1, *shape), np.float32)
        expected = peer(x)
        largest = np.abs(expected).max()
        smallest = min(smallest, float(np.abs(ours(x) - expected).max() / largest))
        moved = max(moved, float(np.abs(peer(x * np.float32(1 + 1e-6)) - expected).max() / largest))
        if smallest <= AGREEMENT:
            return Agreement(runtime, bits, smallest, AGREEMENT, attempt)
    allowed = min(moved, FLIPPED_AGREEMENT)
    if smallest <= allowed:
        return Agreement(runtime, bits, smallest, allowed, ATTEMPTS)
    raise click.ClickException(
        f"{bits} bits in {runtime}: ours and the plain float32 file are not the same function; outputs differ by "
        f"{smallest:.1e} of the largest on the best of {ATTEMPTS} random inputs, {allowed:.1e} would be rounding"
    )


def paired(what: str, bits: str, goal: float, ours: Run, peer: Run, pairs: int, *, short: bool = True) -> Timing:
    """Measure two calls in turns and compare each measurement with its neighbour, as load comes and goes.

    Calls that are ``short`` are warmed up first, and repeated until a measurement is long enough.
    """
    count = 1
    if short:
        warm = [seconds(run, 3) for _ in range(2) for run in (ours, peer)]
        count = max(1, round(MEASUREMENT_SECONDS / min(warm)))
    measured = []
    for pair in range(pairs):
        # whoever comes second may find caches or clocks changed by the first, so they take turns at that too
        times = {run: seconds(run, count) for run in ((ours, peer) if pair % 2 else (peer, ours))}
        measured.append((times[ours], times[peer]))
    return timing(what, bits, goal, measured)


def timing(what: str, bits: str, goal: float, measured: list[tuple[float, float]]) -> Timing:
    """Medians of (ours, peer) pairs and of their ratios."""
    ratios = [a / b for a, b in measured]
    ours, peer, ratio = (statistics.median(values) for values in (*zip(*measured, strict=True), ratios))
    return Timing(what, bits, ours, peer, ratio, min(ratios), max(ratios), len(measured), goal)


def seconds(run: Run, count: int) -> float:
    """Wall time of one call, from ``count`` of them."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def command(arguments: list[str | Path], folder: Path) -> None:
    """Run one of the installed command lines to its end.

    Raises:
        ClickException: It failed.
    """
    program = Path(sys.executable).with_name(str(arguments[0]))
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.run([program, *arguments[1:]], cwd=folder, text=True, errors="replace", check=False, **options)
    if process.returncode:
        raise click.ClickException(f"{arguments[0]} failed:\n{process.stdout[-2000:]}")


class Bench:
    """One checkpoint, its exports and their peers in a folder of their own."""

    def __init__(self, checkpoint: Path, widths: tuple[int, ...], folder: Path, pairs: int, conversions: int) -> None:
        self.model = load_checkpoint(checkpoint)
        self.widths, self.folder, self.pairs, self.conversions = widths, folder, pairs, conversions
        self.exported = folder / "ours"
        self.sizes: list[Size] = []
        self.timings: list[Timing] = []
        self.agreements: list[Agreement] = []
        bits = ",".join(map(str, widths))
        command(["tqexport", "onnx", checkpoint.resolve(), "--bits", bits, "-o", self.exported], folder)

    def width(self, bits: int) -> None:
        """Everything about one width."""
        plain = plain_network(self.model, bits)
        source = self.folder / f"plain-w{bits}.onnx"
        export_plain(plain, self.model.info.input_shape, source)
        work = self.folder / f"peer-w{bits}"
        work.mkdir()
        np.save(work / CALIBRATION, np.zeros((20, 128, 128, 3), np.float32))

        def convert_peer() -> None:
            shutil.copy(source, work / "plain.onnx")  # onnx2tf rewrites its input
            command(["onnx2tf", "-i", "plain.onnx"], work)

        def convert_ours() -> None:
            command(["tqexport", "tflite", self.exported, "--bits", str(bits)], self.folder)

        self.timings.append(
            paired(CONVERSION, str(bits), 0.5, convert_ours, convert_peer, self.conversions, short=False)
        )
        ideal, shape = ideal_bytes(self.model, plain), self.model.info.input_shape
        converted = work / "saved_model" / "plain_float32.tflite"
        for kind, peer, runtime, goal, runner in (
            ("onnx", source, "onnxruntime", 1.05, onnx_runner),
            ("tflite", converted, "LiteRT", 1.10, tflite_runner),
        ):
            ours = next(self.exported.glob(f"*-w{bits}.{kind}"))
            size = ours.stat().st_size
            self.sizes.append(Size(bits, kind, size, ideal, size - ideal, size / ideal, peer.stat().st_size))
            (compute_ours, run_ours), (compute_peer, run_peer) = runner(ours), runner(peer)
            self.agreements.append(check_agreement(runtime, bits, shape, compute_ours, compute_peer))
            x = np.random.default_rng(1).standard_normal((1, *shape), np.float32)
            self.timings.append(paired(f"{runtime} latency", str(bits), goal, run_ours(x), run_peer(x), self.pairs))

    def dynamic_width(self, bits: int) -> None:
        """One width of the files for integer kernels, against TensorFlow's dynamic-range file and the float32 file.

        What they compute is not compared: TensorFlow's file has other weights, rounded once more.
        """
        plain = plain_network(self.model, bits)
        work = self.folder / f"peer-w{bits}"
        work.mkdir()
        export_plain(plain, self.model.info.input_shape, work / "plain.onnx")
        np.save(work / CALIBRATION, np.zeros((20, 128, 128, 3), np.float32))
        command(["onnx2tf", "-i", "plain.onnx", "-odrqt"], work)
        command(["tqexport", "tflite", self.exported, "--bits", str(bits), "--kernel", "dynamic"], self.folder)
        ours = next(self.exported.glob(f"*-w{bits}-dynamic.tflite"))
        x = np.random.default_rng(1).standard_normal((1, *self.model.info.input_shape), np.float32)
        ideal, size = ideal_bytes(self.model, plain), ours.stat().st_size
        for kind, goal in (("dynamic_range_quant", 1.05), ("float32", 0.5)):
            peer = work / "saved_model" / f"plain_{kind}.tflite"
            runs = [tflite_runner(file)[1](x) for file in (ours, peer)]
            self.timings.append(paired(f"LiteRT, {kind} file", str(bits), goal, runs[0], runs[1], self.pairs))
            if kind == "float32":
                float_bytes = peer.stat().st_size
                self.sizes.append(Size(bits, "tflite", size, ideal, size - ideal, size / ideal, float_bytes))

    def all_widths(self) -> None:
        """One run of ours for every width, against the runs of the peer so far."""
        ours = seconds(lambda: command(["tqexport", "tflite", self.exported], self.folder), 1)
        peer = sum(row.peer for row in self.timings if row.what == CONVERSION)
        self.timings.append(timing(CONVERSION, ",".join(map(str, self.widths)), 0.5, [(ours, peer)]))


def size_table(sizes: list[Size]) -> Table:
    """Sizes for people."""
    table = Table(title="Size against one byte per quantised weight", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("bits", "file", "bytes", "ideal", "excess", "ratio", "float32 file"):
        table.add_column(column, justify="left" if column == "file" else "right", no_wrap=True)
    for size in sizes:
        numbers = (f"{value:,}" for value in (size.bytes, size.ideal, size.excess))
        table.add_row(str(size.bits), size.kind, *numbers, f"{size.ratio:.3f}", f"{size.float_bytes:,}")
    return table


def timing_table(timings: list[Timing]) -> Table:
    """Times for people."""
    table = Table(title="Time against plain float32", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("bits", "what", "ours", "peer", "ratio", "min - max", "pairs", "goal", ""):
        table.add_column(column, justify="left" if column in ("what", "") else "right", no_wrap=True)
    for row in sorted(timings, key=lambda row: row.what, reverse=True):
        times = (f"{value:.3f} s" if row.peer > 1 else f"{1e3 * value:.3f} ms" for value in (row.ours, row.peer))
        numbers = (f"{row.ratio:.3f}", f"{row.lowest:.3f} - {row.highest:.3f}", str(row.pairs), f"{row.goal:.2f}")
        table.add_row(row.bits, row.what, *times, *numbers, "met" if row.ratio <= row.goal else "missed")
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--network", type=click.Choice(list(NETWORKS)), help="Random weights, in place of a checkpoint.")
@click.option("--kernel", type=click.Choice(["exact", "dynamic"]), default="exact", show_default=True)
@click.option("--bits", default="2,4,8", show_default=True, help="Widths, separated by commas.")
@click.option("--pairs", default=15, show_default=True, type=click.IntRange(1), help="Latency measurements.")
@click.option("--conversions", default=1, show_default=True, type=click.IntRange(1), help="Conversions per width.")
@click.option("--json", "document", type=click.Path(path_type=Path, dir_okay=False), help="Also write a JSON file.")
def main(
    checkpoint: Path | None,
    network: str | None,
    kernel: str,
    bits: str,
    pairs: int,
    conversions: int,
    document: Path | None,
) -> None:
    """Compare the exports of CHECKPOINT (default: the bundled ResNet-8) with those of the plain float32 network."""
    if checkpoint and network:
        raise click.UsageError("Give a checkpoint or --network, not both.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports the absence of torchvision at every export
    warnings.simplefilter("ignore")
    widths = tuple(int(width) for width in bits.split(","))
    with tempfile.TemporaryDirectory(prefix="tqexport-benchmark-") as temporary:
        folder = Path(temporary)
        source = checkpoint or FIXTURE
        if network:
            source = folder / f"{network}.pt"
            write_random(NETWORKS[network], widths, source)
        bench = Bench(source, widths, folder, pairs, conversions)
        for width in widths:
            click.echo(f"{source.name}: {width} bits ...", err=True)
            bench.width(width) if kernel == "exact" else bench.dynamic_width(width)
        if len(widths) > 1 and kernel == "exact":
            bench.all_widths()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"{source.name}, one sample at a time on one thread\n")
    console.print(size_table(bench.sizes))
    console.print(timing_table(bench.timings))
    if bench.agreements:
        console.print("Same function as the peer; difference, and what passes, relative to the largest output:")
    for found in bench.agreements:
        tried = f"input {found.inputs_tried} of {ATTEMPTS}"
        console.print(f"  {found.bits} bits {found.runtime}: {found.error:.1e}, {found.allowed:.1e} ({tried})")
    if document:
        keys = ("sizes", "timings", "agreements")
        content = {"checkpoint": source.name, **{key: [asdict(row) for row in getattr(bench, key)] for key in keys}}
        document.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
