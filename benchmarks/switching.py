"""One file for every width against one file per width: size, latency, switching and memory.

python benchmarks/switching.py                          the bundled ResNet-8 and a ResNet-20 x5 with random weights
python benchmarks/switching.py --network resnet50       another network, or several

Times are of one sample on one thread. Everything that is compared is measured in turns.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
WIDTHS = tuple(range(1, 9))
KINDS = {"onnx": "onnxruntime", "tflite": "LiteRT"}
IN_USE = (1, 2, 4, 8)  # numbers of widths whose memory is measured
RUN_TIME, FIXED, CLASS, FLOAT = "run-time file", "fixed file", "SwitchableModel", "float32 file"
GOALS = {("onnx", RUN_TIME): 1.5, ("onnx", CLASS): 1.02, ("tflite", CLASS): 1.02}  # of the fixed file's latency
SWITCH_GOAL = 1e-3  # seconds, for a width that was used before

Array = npt.NDArray[np.float32]
Run = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """Time of one sample: seconds, and the ratio to the fixed file measured beside it."""

    kind: str
    bits: int
    what: str
    seconds: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Switch:
    """What it takes to answer at another width, beyond the time of a run that needs no switch; seconds."""

    kind: str
    first: float  # SwitchableModel, a width not used before
    later: float  # SwitchableModel, a width used before
    load: float  # another fixed file from disk


@dataclass(frozen=True)
class Memory:
    """Resident memory with several widths ready to run, beyond that of the imported runtime; bytes."""

    kind: str
    widths: int
    switchable: int
    sessions: int
    goal: int  # the codes, and a float copy for each width


@dataclass(frozen=True)
class Result:
    """One network."""

    network: str
    codes: int
    sizes: Mapping[str, Mapping[str, int]]  # kind: name of the file: bytes
    latencies: Sequence[Latency]
    switches: Sequence[Switch]
    memory: Sequence[Memory]


class Files:
    """The exports of one network in a folder."""

    def __init__(self, network: str, folder: Path) -> None:
        from main_job import CALIBRATION, FIXTURE, NETWORKS, command, export_plain, plain_network, write_random

        from tqexport import load_checkpoint
        from tqexport.training.quantizers import quantized_weights

        source = folder / "net.pt"
        if network == "digits":
            shutil.copy(FIXTURE, source)
        else:
            write_random(NETWORKS[network], WIDTHS, source)
        self.folder = folder / "tqexport-out"
        for arguments in (("onnx", "net.pt"), ("tflite",)):
            for bits in ("all", "runtime"):
                command(["tqexport", *arguments, "--bits", bits], folder)
        model = load_checkpoint(source)
        self.shape = model.info.input_shape
        self.codes = sum(weight.original.numel() for weight in quantized_weights(model.module).values())
        # The float32 networks of all widths are one graph with other numbers, so one stands for all.
        export_plain(plain_network(model, max(WIDTHS)), self.shape, folder / "plain.onnx")
        shutil.copy(folder / "plain.onnx", self.folder / "float32.onnx")
        np.save(folder / CALIBRATION, np.zeros((20, 128, 128, 3), np.float32))
        command(["onnx2tf", "-i", "plain.onnx"], folder)
        shutil.copy(folder / "saved_model" / "plain_float32.tflite", self.folder / "float32.tflite")

    def run_time(self, kind: str) -> Path:
        return self.folder / f"net.{kind}"

    def fixed(self, kind: str, bits: int) -> Path:
        return self.folder / f"net-w{bits}.{kind}"

    def float32(self, kind: str) -> Path:
        return self.folder / f"float32.{kind}"

    def sample(self, kind: str) -> Array:
        x = np.random.default_rng(1).standard_normal((1, *self.shape), np.float32)
        return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if kind == "tflite" else x


def runner(kind: str, path: Path, x: Array, bits: int | None = None) -> Run:
    """The call that answers one sample with a file; ``bits`` for a run-time file."""
    if kind == "onnx":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {session.get_inputs()[0].name: x} | ({} if bits is None else {"bits": np.array(bits, np.uint8)})
        return lambda: session.run(None, feeds)

    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=1)
    interpreter.allocate_tensors()
    if bits is not None:
        signature = interpreter.get_signature_runner(f"w{bits}")
        return lambda: signature(input=x)
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run() -> object:
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    return run


def seconds(run: Run, at_least: float = 0.0) -> float:
    """Wall time of one call, from as many as take ``at_least`` seconds."""
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < at_least:
        run()
        count += 1
    return (time.perf_counter() - start) / count


def latencies(files: Files, kind: str, bits: int, rounds: int, at_least: float) -> list[Latency]:
    """Every way to answer at one width, in turns."""
    from tqexport.runtime import SwitchableModel

    x = files.sample(kind)
    model = SwitchableModel(files.run_time(kind), bits)
    runs: dict[str, Run] = {
        FIXED: runner(kind, files.fixed(kind, bits), x),
        CLASS: lambda: model.run(x),
        RUN_TIME: runner(kind, files.run_time(kind), x, bits),
        FLOAT: runner(kind, files.float32(kind), x),
    }
    for run in (*runs.values(), *runs.values()):
        run()
    measured = []
    for turn in range(rounds):
        order = [*runs][turn % len(runs) :] + [*runs][: turn % len(runs)]
        measured.append({name: seconds(runs[name], at_least) for name in order})
    found = []
    for name in runs:
        ratios = [times[name] / times[FIXED] for times in measured]
        middle = statistics.median(times[name] for times in measured)
        found.append(Latency(kind, bits, name, middle, statistics.median(ratios), min(ratios), max(ratios)))
    return found


def switch(files: Files, kind: str, rounds: int) -> Switch:
    """Medians over switches between widths, each to the answer, without the time of an ordinary run."""
    from tqexport.runtime import SwitchableModel

    x = files.sample(kind)
    model = SwitchableModel(files.run_time(kind))

    def answer(bits: int) -> None:
        model.bits = bits
        model.run(x)

    first, later, load = [], [], []
    for _ in range(max(1, rounds // len(WIDTHS))):
        model.release()
        answer(max(WIDTHS))
        for bits in WIDTHS[:-1]:
            to_answer = seconds(lambda bits=bits: answer(bits))  # type: ignore[misc]
            loaded = seconds(lambda bits=bits: runner(kind, files.fixed(kind, bits), x)())  # type: ignore[misc]
            seconds(lambda: model.run(x), 0.05)
            ordinary = seconds(lambda: model.run(x), 0.05)
            first.append(to_answer - ordinary)
            load.append(loaded - ordinary)
    for _ in range(rounds):
        for bits in WIDTHS:
            to_answer = seconds(lambda bits=bits: answer(bits))  # type: ignore[misc]
            later.append(to_answer - statistics.median(seconds(lambda: model.run(x)) for _ in range(3)))
    return Switch(kind, *map(statistics.median, (first, later, load)))


def memory(files: Files, kind: str, count: int) -> Memory:
    """Resident memory with ``count`` widths, each way in a process of its own."""
    widths = WIDTHS[-count:]
    measured = {}
    for way in ("nothing", "switchable", "sessions"):
        arguments = [way, kind, ",".join(map(str, widths)), ",".join(map(str, files.sample(kind).shape))]
        process = [sys.executable, __file__, "--measure-memory", *arguments, str(files.folder)]
        measured[way] = int(subprocess.run(process, capture_output=True, text=True, check=True).stdout)
    switchable, sessions = (measured[way] - measured["nothing"] for way in ("switchable", "sessions"))
    return Memory(kind, count, switchable, sessions, files.codes + 4 * files.codes * count)


def measure_memory(way: str, kind: str, widths: str, shape: str, folder: str) -> int:
    """Resident bytes of this process after it answered at each of some widths; in a process of its own."""
    import psutil

    from tqexport.runtime import SwitchableModel

    x = np.zeros([int(n) for n in shape.split(",")], np.float32)
    if kind == "onnx":
        import onnxruntime  # noqa: F401 - all three ways have what importing takes
    else:
        import tqexport.backends.tflite.session  # noqa: F401
    kept: list[Any] = []
    every = [int(bits) for bits in widths.split(",")]
    if way == "switchable":
        kept.append(SwitchableModel(Path(folder, f"net.{kind}")))
        for kept[0].bits in every:
            kept[0].run(x)
    elif way == "sessions":
        kept += [runner(kind, Path(folder, f"net-w{bits}.{kind}"), x) for bits in every]
        for run in kept:
            run()
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def measure(network: str, rounds: int, at_least: float) -> Result:
    """Everything about one network."""
    with tempfile.TemporaryDirectory(prefix="tqexport-benchmark-") as folder:
        click.echo(f"{network}: exporting ...", err=True)
        files = Files(network, Path(folder))
        sizes, times, switches, used = {}, [], [], []
        for kind, runtime in KINDS.items():
            named = {RUN_TIME: files.run_time(kind), FLOAT: files.float32(kind)}
            named |= {f"w{bits}": files.fixed(kind, bits) for bits in WIDTHS}
            sizes[kind] = {name: path.stat().st_size for name, path in named.items()}
            for bits in WIDTHS:
                click.echo(f"{network}: {runtime}, {bits} bits ...", err=True)
                times += latencies(files, kind, bits, rounds, at_least)
            click.echo(f"{network}: {runtime}, switching and memory ...", err=True)
            switches.append(switch(files, kind, rounds))
            used += [memory(files, kind, count) for count in IN_USE]
        return Result(network, files.codes, sizes, times, switches, used)


def tables(result: Result) -> list[Table]:
    """A result for people."""

    def table(title: str, *columns: str) -> Table:
        made = Table(title=f"{result.network}: {title}", box=box.SIMPLE_HEAD, title_justify="left")
        for column in columns:
            made.add_column(column, justify="left" if column in ("runtime", "") else "right", no_wrap=True)
        return made

    def met(value: float, goal: float | None) -> str:
        return "" if goal is None else f"goal {goal:g}, {'met' if value <= goal else 'missed'}"

    size = table("bytes", "runtime", "one file", "eight files", "ratio", "eight float32 files", "ratio")
    latency = table("one sample", "runtime", "bits", *(f"{name}" for name in (FIXED, CLASS, RUN_TIME, FLOAT)))
    ratio = table("ratio to the fixed file, median over widths", "runtime", "what", "ratio", "min - max", "")
    switching = table(
        "another width, beyond an ordinary run", "runtime", "first time", "later", "load a fixed file", ""
    )
    used = table("resident memory, MB", "runtime", "widths", CLASS, "a session each", "ratio", "codes + float copies")
    for kind, runtime in KINDS.items():
        of_kind = result.sizes[kind]
        one, eight = of_kind[RUN_TIME], sum(of_kind[f"w{bits}"] for bits in WIDTHS)
        floats = len(WIDTHS) * of_kind[FLOAT]
        size.add_row(runtime, f"{one:,}", f"{eight:,}", f"{one / eight:.3f}", f"{floats:,}", f"{one / floats:.3f}")
        rows = [row for row in result.latencies if row.kind == kind]
        for bits in WIDTHS:
            by_name = {row.what: row for row in rows if row.bits == bits}
            cells = (f"{1e3 * by_name[name].seconds:.3f} ms" for name in (FIXED, CLASS, RUN_TIME, FLOAT))
            latency.add_row(runtime, str(bits), *cells)
        for name in (CLASS, RUN_TIME, FLOAT):
            ratios = [row.ratio for row in rows if row.what == name]
            middle = statistics.median(ratios)
            spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
            ratio.add_row(runtime, name, f"{middle:.3f}", spread, met(middle, GOALS.get((kind, name))))
        found = next(each for each in result.switches if each.kind == kind)
        cells = (f"{1e3 * value:.3f} ms" for value in (found.first, found.later, found.load))
        switching.add_row(runtime, *cells, f"later: {met(1e3 * found.later, 1e3 * SWITCH_GOAL)}")
        for row in (row for row in result.memory if row.kind == kind):
            share = f"{row.switchable / row.sessions:.2f}" if row.sessions > 0 else ""
            numbers = (f"{value / 1e6:.1f}" for value in (row.switchable, row.sessions))
            used.add_row(runtime, str(row.widths), *numbers, share, f"{row.goal / 1e6:.1f}")
    return [size, latency, ratio, switching, used]


def draw(results: Sequence[Result], path: Path) -> None:
    """Size and latency by width, one file against eight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 3, squeeze=False)
    styles = {FIXED: ("C0", "o"), CLASS: ("C1", "x"), RUN_TIME: ("C2", "s"), FLOAT: ("0.5", "")}
    for row, result in zip(axes, results, strict=True):
        sizes = {kind: np.array([named[f"w{bits}"] for bits in WIDTHS]) / 1e6 for kind, named in result.sizes.items()}
        for number, (kind, runtime) in enumerate(KINDS.items()):
            color = f"C{3 + number}"
            row[0].plot(WIDTHS, np.cumsum(sizes[kind]), color=color, marker="o", label=f"{runtime}: a file per width")
            one = result.sizes[kind][RUN_TIME] / 1e6
            row[0].plot(WIDTHS, [one] * len(WIDTHS), color=color, linestyle="--", label=f"{runtime}: one file")
            axis = row[1 + number]
            for name, (line, marker) in styles.items():
                found = [each.seconds * 1e3 for each in result.latencies if (each.kind, each.what) == (kind, name)]
                axis.plot(WIDTHS, found, color=line, marker=marker, label=name, alpha=0.9)
            axis.set(title=f"{result.network}, {runtime}", xlabel="bits", ylabel="ms per sample", ylim=(0, None))
        row[0].set(title=f"{result.network}, size", xlabel="number of widths", ylabel="MB", ylim=(0, None))
        row[0].legend(fontsize="small")
        row[1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--network",
    "networks",
    type=click.Choice(["digits", "resnet20x5", "resnet50"]),
    multiple=True,
    default=("digits", "resnet20x5"),
    show_default=True,
    help="May be given several times.",
)
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1), help="Measurements of each latency.")
@click.option("--seconds", "at_least", default=0.1, show_default=True, help="Length of one measurement.")
@click.option("--json", "document", type=click.Path(path_type=Path, dir_okay=False), help="Also write a JSON file.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Also draw a PNG file.")
@click.option("--save", is_flag=True, help="Write both into benchmarks/results.")
def main(
    networks: tuple[str, ...], rounds: int, at_least: float, document: Path | None, picture: Path | None, save: bool
) -> None:
    """Compare one file for every width, and SwitchableModel over it, with one file per width."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports the absence of torchvision at every export
    warnings.simplefilter("ignore")
    if save:
        document, picture = document or RESULTS / "switching.json", picture or RESULTS / "switching.png"
    results = [measure(network, rounds, at_least) for network in dict.fromkeys(networks)]
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for result in results:
        for table in tables(result):
            console.print(table)
    if document:
        versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "ai-edge-litert")}
        document.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": versions, "threads": 1, "results": [asdict(result) for result in results]}
        document.write_text(json.dumps(content, indent=1) + "\n")
    if picture:
        draw(results, picture)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure-memory"]:
        print(measure_memory(*sys.argv[2:]))
    else:
        main()
