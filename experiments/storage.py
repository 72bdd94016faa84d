"""Bytes of ResNet-50 in its files: float32, 8-bit codes, and each width packed.

python -m experiments.storage    writes storage.json, and storage.csv tensor by tensor

The 8-bit figures are the initializers of the ONNX file that tqexport writes, the float32 ones those of the same file
with every shifted code replaced by its float value, as an ordinary exporter writes it. Weights are random: sizes do not
depend on values. Packed, a code takes b bits and everything else stays as it is; no file format here does that.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from experiments.results import RESULTS, write_json
from tqexport import CheckpointInfo, TruncModel
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.onnx.file import coded_weights
from tqexport.backends.onnx.runtime_file import merge_onnx
from tqexport.backends.tflite.float_graph import with_float_weights
from tqexport.networks.research_models import resnet50q
from tqexport.truncation import STORED_BITS, WIDTHS

PAPER = 3.53  # times smaller than float32, arXiv 2506.11431
JOINT = (1, 2, 4, 8)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm per width": lambda: resnet50q(widths=JOINT),
    "plain BatchNorm in the shortcuts": lambda: resnet50q(widths=JOINT, plain_downsample_norm=True),
    "plain BatchNorm": lambda: resnet50q(widths=None),
}
Row = tuple[str, str, int, int]  # tensor, kind, bytes in float32, bytes with 8-bit codes
KINDS = ("quantised weights", "scales, offsets, shifts", "float convolutions", "classifier", "BatchNorm", "constants")


def kind_of(name: str, coded: set[str]) -> str:
    """What an initializer of a file of ours is, by its name."""
    stem, _, last = name.rpartition(".")
    if (stem in coded and last == "codes") or name in coded:
        return "quantised weights"
    if stem in coded:
        return "scales, offsets, shifts"
    if "bn" in stem.split(".")[-1] or last.startswith("running_") or ".downsample.1" in f".{stem}":
        return "BatchNorm"
    if stem == "fc":
        return "classifier"
    return "float convolutions" if last == "weight" else "constants"


def sizes_of(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of each initializer of a file."""
    return {tensor.name: numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer}


def by_kind(sizes: Mapping[str, int], coded: set[str]) -> dict[str, int]:
    """Bytes of each kind of initializer."""
    total = Counter[str](dict.fromkeys(KINDS, 0))
    for name, size in sizes.items():
        total[kind_of(name, coded)] += size
    return dict(total)


def measure(network: nn.Module, input_shape: tuple[int, ...] = (3, 224, 224)) -> tuple[dict[str, Any], list[Row]]:
    """The figures of one network, and its tensors one by one."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):  # fresh ones are all alike, and a file holds equal tables once
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    files = dict(export_onnx(TruncModel(network.eval(), CheckpointInfo("resnet50q", {}, input_shape, JOINT)), JOINT))
    stored = onnx.load_from_string(files[STORED_BITS])
    weights = coded_weights(stored)
    coded = {weight.name for weight in weights}
    codes, floats = sizes_of(stored), sizes_of(with_float_weights(stored, weights))
    kinds, float_kinds = by_kind(codes, coded), by_kind(floats, coded)
    every = onnx.load_from_string(merge_onnx(files.items()))
    sizes = {"8-bit codes": sum(codes.values())} | {
        f"packed, {bits} bit{'s' * (bits > 1)}": _packed(kinds, bits) for bits in reversed(WIDTHS[:-1])
    }
    figures = {
        "float32_bytes": {**float_kinds, "total": sum(floats.values())},
        "codes_bytes": {**kinds, "total": sum(codes.values())},
        "total_bytes": sizes,
        "times_smaller": {name: round(sum(floats.values()) / size, 2) for name, size in sizes.items()},
        "file_bytes_8_bits": len(files[STORED_BITS]),
        "file_bytes_widths_1_2_4_8_in_one": every.ByteSize(),
    }
    # Only the codes have another name than the float weights that they stand for.
    names = dict.fromkeys(name.removesuffix(".codes") for name in (*floats, *codes))
    rows = [
        (name, kind_of(name, coded), floats.get(name, 0), codes.get(f"{name}.codes", codes.get(name, 0)))
        for name in names
    ]
    return figures, rows


def if_more_were_coded(codes: Mapping[str, int], float32: int) -> dict[str, float]:
    """Times smaller with 8-bit codes for what the research networks leave in float32."""
    total = codes["total"]
    convolutions, classifier = codes["float convolutions"] * 3 // 4, codes["classifier"] * 3 // 4
    return {
        "8-bit codes, every convolution": round(float32 / (total - convolutions), 2),
        "8-bit codes, every convolution and the classifier": round(float32 / (total - convolutions - classifier), 2),
        "float32 and 8-bit codes together, against the codes alone": round((float32 + total) / total, 2),
    }


def _packed(codes: Mapping[str, int], bits: int) -> int:
    quantized = codes["quantised weights"]
    return sum(codes.values()) - quantized + (quantized * bits + 7) // 8


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=RESULTS, show_default="experiments/results")
def main(folder: Path) -> None:
    """Export and count."""
    measured = {}
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        measured[name] = measure(build())
        print(f"{name}: {measured[name][0]['times_smaller']['8-bit codes']} times smaller", flush=True)
    figures, rows = next(iter(measured.values()))
    content = {
        "paper": PAPER,
        "if_more_were_coded": if_more_were_coded(figures["codes_bytes"], figures["float32_bytes"]["total"]),
        "resnet50q": {name: table for name, (table, _) in measured.items()},
    }
    write_json(folder / "storage.json", content)
    with (folder / "storage.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("tensor", "kind", "float32 bytes", "bytes with 8-bit codes"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
