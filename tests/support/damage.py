"""Harm done to artifacts, as a build that went wrong would do it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tqexport.backends.tflite.flatbuffer import FlatModel

__all__ = [
    "LAYER",
    "changed_onnx",
    "changed_tflite",
    "flip_a_bit",
    "index_of",
    "onnx_value",
    "replace_artifact",
    "scaled_onnx",
    "scaled_tflite",
]

LAYER = "layers.1.conv1"  # of the digits network

Change = Callable[[Any], Any]


def flip_a_bit(value: Any) -> Any:
    """Another value in one element of the codes."""
    value.view(np.uint8).reshape(-1)[17] ^= 0x80  # the highest bit, so that every width sees it
    return value


def onnx_value(content: bytes, name: str) -> Any:
    """The value of an initializer."""
    model = onnx.load_from_string(content)
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def changed_onnx(content: bytes, name: str, change: Change) -> bytes:
    """An ONNX file with another value in an initializer."""
    model = onnx.load_from_string(content)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = np.array(change(numpy_helper.to_array(tensor).copy()), order="C")  # which keeps a scalar one
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return bytes(model.SerializeToString())


def scaled_onnx(content: bytes, factor: float) -> bytes:
    """An ONNX file with another scale in LAYER."""
    return changed_onnx(content, f"{LAYER}.weight.scale", lambda value: value * np.float32(factor))


def index_of(flat: FlatModel, name: str) -> int:
    """Index of the first tensor of that name."""
    return next(i for i in range(len(flat.graph.tensors)) if flat.name(i) == name)


def changed_tflite(content: bytes, name: str, change: Change) -> bytes:
    """A TFLite file with another value in a constant."""
    flat = FlatModel(content)
    index = index_of(flat, name)
    flat.set_constant(index, np.ascontiguousarray(change(flat.constant(index).copy())))
    return flat.pack()


def scaled_tflite(content: bytes, factor: float) -> bytes:
    """A TFLite file with other scales in LAYER."""
    flat = FlatModel(content)
    quantization = flat.tensor(index_of(flat, f"{LAYER}.weight.codes")).quantization
    quantization.scale = np.asarray(quantization.scale) * np.float32(factor)
    return flat.pack()


def replace_artifact(folder: Path, name: str, change: Change) -> None:
    """Change an artifact of an export folder, and enter its new hash into the manifest."""
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    manifest = folder / "tqexport.json"
    content = json.loads(manifest.read_text())
    (entry,) = (entry for entry in content["artifacts"] if entry["file"] == name)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
