"""Latency of the integer files against today's float files and onnxruntime's own static quantisation, one thread.

python benchmarks/integer.py --network resnet20x5    ratios of paired runs; nothing but the ratios means anything

Weights are random, as latency does not depend on them. onnxruntime's static quantisation (QDQ, uint8 activations, int8
weights per channel, min-max) gets the same network with plain weights and ReLUs, and so do onnx2tf and TensorFlow.
"""

from __future__ import annotations

import copy
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from ai_edge_litert.interpreter import Interpreter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

from tqexport import CheckpointInfo, TruncModel
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.backends.onnx.integer_runtime_file import runtime_integer_onnx
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.integer.build import integer_model
from tqexport.integer.calibration import calibrate
from tqexport.integer.grids import OFFSET
from tqexport.networks.registry import find_factory
from tqexport.training.layers import switchable_batch_norms
from tqexport.training.quantizers import ActivationQuantizer, quantized_weights

Run = Callable[[], object]
Inputs = npt.NDArray[np.float32]

NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "resnet20x5": ("resnet20q", {"expansion": 5}, (3, 32, 32)),
    "resnet50": ("resnet50q", {}, (3, 224, 224)),
    "resnet8": ("resnet8", {}, (3, 32, 32)),
    "mobilenet": ("mobilenet", {}, (3, 96, 96)),
    "ds_cnn": ("ds_cnn", {}, (1, 49, 10)),
    "autoencoder": ("autoencoder", {}, (640,)),
}
WIDTHS = (2, 4, 7, 8)
EXACT, ONNX_STATIC, LITERT_STATIC = "exact, 4 bits", "onnxruntime static int8", "LiteRT static int8"
SAMPLES = 16
CALIBRATION = "calibration_image_sample_data_20x128x128x3_float32.npy"


@dataclass(frozen=True)
class Peer:
    """A file open in its runtime."""

    name: str
    run: Run


def onnx_peer(name: str, content: bytes, x: Inputs, **more: Any) -> Peer:
    """An ONNX file in onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Peer(name, lambda: session.run(None, {"input": x, **more}))


def tflite_peer(name: str, content: bytes, x: npt.NDArray[np.int8]) -> Peer:
    """A TFLite file in LiteRT with XNNPACK."""
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    index = interpreter.get_input_details()[0]["index"]

    def run() -> None:
        interpreter.set_tensor(index, x)
        interpreter.invoke()

    return Peer(name, run)


def network(name: str, widths: tuple[int, ...] = WIDTHS) -> TruncModel:
    """A network of random weights whose BatchNorms leave values between 0 and 1.

    The weights have the bell shape of trained ones: at 8 bits the number of the largest weights matters.
    """
    architecture, arguments, shape = NETWORKS[name]
    torch.manual_seed(0)
    module = find_factory(architecture)(**arguments, widths=widths)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.2, 0.5)
                part.bias.uniform_(0.2, 0.6)
        for weight in quantized_weights(module).values():
            weight.original.normal_(0, 0.05)
    return TruncModel(module.eval(), CheckpointInfo(architecture, arguments, shape, widths))


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, inputs: Inputs) -> None:
        self._batches = iter([{"input": inputs[i : i + 1]} for i in range(len(inputs))])

    def get_next(self) -> dict[str, Inputs] | None:
        return next(self._batches, None)


def statically_quantized(model: TruncModel, inputs: Inputs, folder: Path) -> tuple[bytes, bytes]:
    """The plain float network, and what onnxruntime's static quantisation makes of it."""
    with model.at_width(8) as reference:
        memo: dict[int, Any] = {}
        for weight in quantized_weights(reference).values():
            plain = copy.deepcopy(weight.module)
            parametrize.remove_parametrizations(plain, weight.parameter, leave_parametrized=False)
            memo[id(weight.module)] = plain
        for norm in switchable_batch_norms(reference).values():
            memo[id(norm)] = copy.deepcopy(norm.current)
        for part in reference.modules():
            if isinstance(part, ActivationQuantizer):
                memo[id(part)] = nn.ReLU()
        plain_network = copy.deepcopy(reference, memo).eval()
    path, prepared, quantized = (folder / f"{name}.onnx" for name in ("float", "prepared", "static"))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        plain_network,
        (torch.from_numpy(inputs[:2]),),
        dynamo=True,
        input_names=["input"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    program.save(path)
    quant_pre_process(str(path), str(prepared))
    quantize_static(
        str(prepared),
        str(quantized),
        _Reader(inputs),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path.read_bytes(), quantized.read_bytes()


def litert_static(plain: bytes, inputs: Inputs, folder: Path) -> bytes:
    """What onnx2tf and TensorFlow's converter make of the plain network: int8, filters per channel, int8 in and out."""
    (folder / "plain.onnx").write_bytes(plain)
    samples = np.moveaxis(inputs, 1, -1) if inputs.ndim > 2 else inputs
    np.save(folder / "samples.npy", samples)
    np.save(folder / CALIBRATION, samples)  # onnx2tf would download it, and then does not read it
    ones = "[" * samples.ndim + ",".join("1" * samples.shape[-1]) + "]" * samples.ndim
    calibration = ["-cind", "input", "samples.npy", ones.replace("1", "0"), ones]
    arguments = ["-oiqt", "-qt", "per-channel", "-iqd", "int8", "-oqd", "int8", *calibration, "-b", "1"]
    program = Path(sys.executable).with_name("onnx2tf")
    subprocess.run([program, "-i", "plain.onnx", *arguments], cwd=folder, check=True, capture_output=True)
    return (folder / "saved_model" / "plain_full_integer_quant.tflite").read_bytes()


def seconds(run: Run, least: float) -> float:
    """Seconds per run, over as many runs as take ``least`` seconds."""
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter() - start) < least or count < 2:
        run()
        count += 1
    return now / count


def measure(peers: list[Peer], rounds: int, least: float) -> dict[str, list[float]]:
    """Seconds per run of every peer in each round; a round measures them one after the other."""
    for peer in peers:
        seconds(peer.run, least / 2)
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            times[peer.name].append(seconds(peer.run, least))
    return times


@click.command()
@click.option("--network", "name", type=click.Choice(list(NETWORKS)), default="resnet20x5", show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--least", default=0.15, show_default=True, help="Seconds that each measurement takes at least.")
def main(name: str, rounds: int, least: float) -> None:
    """Print milliseconds and ratios."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = network(name)
    inputs = np.random.default_rng(0).random((SAMPLES, *model.info.input_shape), np.float32)
    calibrated = calibrate(model, inputs)
    x = inputs[:1]
    with tempfile.TemporaryDirectory() as folder:
        # Its own network: torch takes the parametrization of a layer from all copies of it.
        plain, static = statically_quantized(network(name), inputs, Path(folder))
        litert = litert_static(plain, inputs, Path(folder))
    peers = [onnx_peer("float network", plain, x), onnx_peer(ONNX_STATIC, static, x)]
    peers += [onnx_peer(EXACT, next(content for _, content in export_onnx(model, (4,))), x)]
    peers += [onnx_peer(f"integer, {bits} bits", integer_onnx(calibrated, bits), x) for bits in WIDTHS]
    switchable = runtime_integer_onnx(calibrated, [bits for bits in WIDTHS if bits < 8])
    peers.append(onnx_peer("integer, run-time at 4 bits", switchable, x, bits=np.array(4, np.uint8)))
    given = np.ascontiguousarray(np.moveaxis(x, 1, -1) if x.ndim > 2 else x)
    peers.append(tflite_peer(LITERT_STATIC, litert, (given * 127).astype(np.int8)))
    for bits in (4, 8):
        levels = integer_model(calibrated, bits).run(x)["input"].astype(np.int16) - OFFSET
        levels = np.ascontiguousarray(np.moveaxis(levels, 1, -1) if levels.ndim > 2 else levels)
        peers.append(
            tflite_peer(f"LiteRT integer, {bits} bits", integer_tflite(calibrated, bits), levels.astype(np.int8))
        )
    times = measure(peers, rounds, least)
    table = Table("", "ms", "to exact", "to ort static", "to LiteRT static")
    table.title = f"{name}, one thread, median of {rounds} rounds"
    for peer, measured in times.items():
        against = [
            statistics.median(a / b for a, b in zip(measured, times[other], strict=True))
            for other in (EXACT, ONNX_STATIC, LITERT_STATIC)
        ]
        table.add_row(peer, f"{1000 * statistics.median(measured):.2f}", *(f"{ratio:.2f}" for ratio in against))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
