"""A folder for trials: what commands read, and what they write when nobody disturbs them."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import dask
import torch
from checks import hashes, is_input, require, temporary
from command_lines import COMMANDS, GROWS
from processes import forked_worker, run, said
from torch import nn
from web_copy import web_copy

from tqexport import CheckpointInfo, Normalization, prepare, save_checkpoint
from tqexport.artifacts.manifest import FILE_NAME
from tqexport.artifacts.project import open_project
from tqexport.backends.onnx import export
from tqexport.backends.tflite import onnx2tf, onnx2tf_worker
from tqexport.checkpoints.options import ReadOptions
from tqexport.deploy import deploy
from tqexport.networks.registry import ARCHITECTURES
from tqexport.truncation import WIDTHS

FIXTURES = Path(__file__).parents[2] / "fixtures"
IMPORTED = (
    "distributed",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "onnxruntime",
    "rich.live",
    "rich.table",
)
WORKERS = "distributed.worker.multiprocessing-method"  # a setting of Dask; "fork", as they have nothing to import then
CONVERTER = ("onnx2tf", "tensorflow", "tf_keras")
TRACE = export.capture


@dataclass
class Workplace:
    """A folder for trials, and what undisturbed runs make in it.

    Attributes:
        root: The folder.
        seconds_of_export: How long it takes to export a checkpoint at a width.
        wanted: By command: hash by name of every file after an undisturbed run.
        previous: The same before it.
        seconds: How long it takes.
        operations: How many operations on files it makes.
        largest: Bytes of the largest file that it writes.
    """

    root: Path
    seconds_of_export: float
    wanted: dict[str, dict[str, str]]
    previous: dict[str, dict[str, str]]
    seconds: dict[str, float]
    operations: dict[str, int]
    largest: dict[str, int]


def small_network() -> nn.Module:
    """Two quantised convolutions for digits, prepared, with random weights."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in ((1, 4), (4, 8), (8, 8)):
        parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return prepare(nn.Sequential(*parts, nn.Flatten(), nn.Linear(8, 10)), WIDTHS).eval()


def make_workplace(root: Path, names: list[str]) -> Workplace:
    """Make the inputs, and run every command once without disturbing it."""
    start = root / "start"
    start.mkdir()
    ARCHITECTURES["small"] = small_network
    shutil.copy(FIXTURES / "digits-test.npz", start / "data.npz")
    web_copy(start / "web")
    network = small_network()
    info = CheckpointInfo("small", {}, (1, 8, 8), WIDTHS, normalization=Normalization((0.3,), (0.4,)))
    save_checkpoint(start / "ckpt.pt", network, info)
    with torch.no_grad():
        network.state_dict()["10.bias"].add_(1)
    save_checkpoint(start / "other.pt", network, info)
    require(run(start, "calibrate ckpt.pt --data data.npz -o int.pt") == 0, f"calibrate fails: {said(start)}")
    os.environ |= onnx2tf_worker.ENVIRONMENT
    for library in IMPORTED + (CONVERTER if "tflite" in names else ()):
        importlib.import_module(library)
    onnx2tf.run_worker = forked_worker
    dask.config.set({WORKERS: "fork"})
    seconds, traced = 0.0, None
    if not all("convert" in COMMANDS[name].line for name in names):
        # In this process, so that all that it imports is there in those that are forked from it.
        project = open_project(start / "ckpt.pt", start / "given", ReadOptions())
        project.export_runtime("onnx")
        began = time.monotonic()
        list(project.export("onnx", (4,)))
        seconds = time.monotonic() - began
        traced = TRACE(deploy(project.model, 8), info.signature)
    place = Workplace(root, seconds, {}, {}, {}, {}, {})
    for name in names:
        command = COMMANDS[name]
        folder = fresh(place, None)
        for line in command.before:
            require(run(folder, line) == 0, f"{line} fails: {said(folder)}")
        if (folder / "out").is_dir():  # as the exports of an earlier state of the same checkpoint
            as_of_earlier(folder)
        shutil.copytree(folder, root / name)
        place.previous[name] = hashes(folder)
        counted = root / "count"
        began = time.monotonic()
        require(run(folder, command.line, counting=counted) == 0, f"{command.line} fails: {said(folder)}")
        place.seconds[name] = time.monotonic() - began
        place.operations[name] = int(counted.read_text())
        place.wanted[name] = hashes(folder)
        written = [folder / file for file in place.wanted[name] if not is_input(file)]
        place.largest[name] = max((path.stat().st_size for path in written), default=0)
        for grown in filter(lambda file: file.endswith(GROWS), place.wanted[name]):
            (root / "whole").mkdir(exist_ok=True)
            shutil.copy(folder / grown, root / "whole" / grown)
        require(not temporary(folder), f"{name} leaves {temporary(folder)}")
    if traced:
        export.capture = lambda *_: traced  # whose values are filled in for each width, here in a process of their own
    return place


def trace_anew() -> None:
    """Trace the network in this process, as commands do."""
    export.capture = TRACE


def as_of_earlier(folder: Path) -> None:
    """Let the manifest of exports of ``other.pt`` say that they are of an earlier ``ckpt.pt``."""
    manifest = folder / "out" / FILE_NAME
    text = manifest.read_text().replace("other.pt", "ckpt.pt")
    for path in sorted((folder / "out").glob("other-*")):
        path.rename(path.with_name(path.name.replace("other-", "ckpt-")))
    manifest.write_text(text.replace('"other-', '"ckpt-'))


def fresh(place: Workplace, name: str | None) -> Path:
    """An empty place for a trial of a command."""
    folder = place.root / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.root / (name or "start"), folder)
    (folder / "tmp").mkdir(exist_ok=True)
    return folder
