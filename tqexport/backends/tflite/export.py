"""TFLite files that hold one byte per quantised weight.

An ONNX file of ours goes to float TFLite through onnx2tf, then the codes go back in
(:mod:`tqexport.backends.tflite.codes`).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tqexport.artifacts.manifest import Kernel
from tqexport.backends.onnx.file import INPUT_NAME, OUTPUT_NAME, CodedWeight, coded_weights, read_metadata
from tqexport.backends.tflite.check import channels_first_values, refuse_operators, with_fine_levels
from tqexport.backends.tflite.codes import put_codes_back
from tqexport.backends.tflite.file import CHANNELS_FIRST, METADATA_NAME, finish_fixed
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.float_graph import for_one_sample, with_float_weights, without_batch_norms
from tqexport.backends.tflite.session import open_interpreter
from tqexport.backends.tflite.template import (
    TfliteTemplate,
    graph_key,
    locate_parameters,
    parameters,
    with_fingerprints,
)
from tqexport.errors import ConversionError, InputError

__all__ = ["METADATA_NAME", "FloatNetwork", "convert_to_tflite", "float_networks", "run_once"]

LAYOUT = "channels last"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FloatNetwork:
    """A network as the converter wrote it, checked and named; its codes are not back yet.

    Attributes:
        flat: The file, with float32 filters.
        weights: Its quantised weights.
        facts: What the file is to say of itself.
    """

    flat: FlatModel
    weights: Sequence[CodedWeight]
    facts: Mapping[str, Any]


def convert_to_tflite(models: Sequence[onnx.ModelProto], kernel: Kernel = "exact") -> list[bytes]:
    """Convert ONNX files of tqexport to TFLite, codes intact.

    The result takes one sample at a time, channels last (NHWC), as devices do.

    Args:
        models: ONNX models with BitShift nodes, at any widths.
        kernel: See :func:`tqexport.backends.tflite.codes.put_codes_back`.

    Returns:
        One serialised, loaded and tried TFLite file per model. The same model gives the same bytes.

    Raises:
        ConversionError: onnx2tf cannot convert the network, a layer's codes are not found again, an operator would
            need code of its own on the device, or LiteRT does not run the file.
    """
    results = []
    for network in float_networks(models):
        put_codes_back(network.flat, network.weights, kernel)
        content = finish_fixed(network.flat, {**network.facts, "kernel": kernel})
        run_once(content)
        results.append(content)
    return results


def float_networks(models: Sequence[onnx.ModelProto]) -> Iterator[FloatNetwork]:
    """Convert ONNX files of tqexport to float TFLite, one at a time; those of one graph cost one conversion.

    Raises:
        ConversionError: As :func:`convert_to_tflite`.
    """
    weights = [coded_weights(model) for model in models]
    floats = [
        for_one_sample(without_batch_norms(with_float_weights(model, found)))
        for model, found in zip(models, weights, strict=True)
    ]
    for model, found, (flat, channels_first) in zip(models, weights, _converted(floats), strict=True):
        facts = {**read_metadata(model), "layout": LAYOUT}
        yield FloatNetwork(flat, found, facts | ({CHANNELS_FIRST: channels_first} if channels_first else {}))


def _converted(models: Sequence[onnx.ModelProto]) -> Iterator[tuple[FlatModel, list[str]]]:
    """Float networks in TFLite, with the values in them that are channels first all the same.

    Networks that differ in their parameters alone are converted once.
    """
    keys = [graph_key(model) for model in models]
    one_of = dict(zip(keys, models, strict=True))
    for model in one_of.values():
        refuse_operators(model)
    graphs = {key: with_fingerprints(model) for key, model in one_of.items()}
    converted = _run_onnx2tf(list(graphs.values()))
    templates = {
        key: locate_parameters(content, graph) for (key, graph), content in zip(graphs.items(), converted, strict=True)
    }
    # Where the converter combined parameters beyond recognition, each network is converted by itself.
    singly = [model for model, key in zip(models, keys, strict=True) if templates[key] is None]
    fine = {key: with_fine_levels(model) for key, model in one_of.items()}
    unknown = [fine[key] for key, template in templates.items() if template is None]
    single = iter(_run_onnx2tf(unknown + singly) if singly else [])

    def written(template: TfliteTemplate | None, model: onnx.ModelProto) -> FlatModel:
        flat = FlatModel(next(single)) if template is None else template.fill(parameters(model))
        _check_operators(flat)
        _name_tensors(flat, [node.output[0] for node in model.graph.node if node.op_type == "Round"])
        return flat

    channels_first = {
        key: channels_first_values(fine[key], written(template, fine[key])) for key, template in templates.items()
    }
    for model, key in zip(models, keys, strict=True):
        yield written(templates[key], model), channels_first[key]


def run_once(content: bytes) -> None:
    """Load a file in LiteRT and run it on zeros, with XNNPACK and without.

    Raises:
        ConversionError: It does not load, does not run, or gives NaN.
    """
    for xnnpack in (True, False):
        try:
            interpreter = open_interpreter(content, xnnpack=xnnpack)
            for detail in interpreter.get_input_details():
                interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
            interpreter.invoke()
            outputs = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
        except (InputError, RuntimeError, ValueError) as error:
            raise ConversionError(f"LiteRT does not run the converted file: {error}") from error
        if not all(np.isfinite(output).all() for output in outputs):
            raise ConversionError("the converted file gives NaN or infinity on an input of zeros")


def _run_onnx2tf(models: Sequence[onnx.ModelProto]) -> list[bytes]:
    """Convert float networks in one process of their own (see :mod:`tqexport.backends.tflite.onnx2tf_worker`)."""
    with tempfile.TemporaryDirectory(prefix="tqexport-") as folder:
        sources = [Path(folder, f"{i}.onnx") for i in range(len(models))]
        targets = [source.with_suffix(".tflite") for source in sources]
        for model, source in zip(models, sources, strict=True):
            onnx.save(model, str(source))
        pairs = [str(path) for pair in zip(sources, targets, strict=True) for path in pair]
        process = subprocess.Popen(
            [sys.executable, "-m", "tqexport.backends.tflite.onnx2tf_worker", *pairs],
            cwd=folder,
            env={**os.environ, "TMPDIR": folder},  # whatever the libraries leave behind goes with the folder
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            printed = process.communicate()[0].decode(errors="replace")
        finally:  # an interrupt must not leave TensorFlow working on
            process.kill()
            process.wait()
        _log.debug("onnx2tf printed:\n%s", printed)
        if process.returncode or not all(target.is_file() for target in targets):
            raise ConversionError(f"onnx2tf could not convert the network: {_last_words(process.returncode, printed)}")
        return [target.read_bytes() for target in targets]


def _last_words(returncode: int, printed: str) -> str:
    if returncode < 0:
        return f"it was ended by {signal.Signals(-returncode).name} (is there enough memory?)"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    operator = re.search(r"onnx_op_name: (\S+)", printed)
    where = f"at {operator[1]}: " if operator else ""
    return where + (telling or lines or ["it printed nothing"])[-1][:300] + " (--verbose shows all that it printed)"


def _check_operators(flat: FlatModel) -> None:
    for operator in flat.graph.operators:
        name = flat.operator_name(operator)
        code = flat.model.operatorCodes[operator.opcodeIndex]
        if name == "CUSTOM" or code.customCode:
            custom = code.customCode.decode() if code.customCode else name
            raise ConversionError(f"the network needs the operator {custom}, which plain TFLite does not have")


def _name_tensors(flat: FlatModel, rounds: Sequence[str]) -> None:
    """Names that depend on the network alone, where TensorFlow counts what it did before.

    Args:
        flat: The file; changed in place.
        rounds: Names of the network's Round results in graph order. onnx2tf numbers its ``tf.math.round`` operators in
            that order, which survives where the order of operators in the file does not.
    """
    for index, tensor in enumerate(flat.graph.tensors):
        tensor.name = f"constant_{index}" if flat.constant(index) is not None else f"value_{index}/{flat.name(index)}"
    for operator in flat.graph.operators:
        kind = flat.operator_name(operator)
        for index in map(int, operator.outputs):
            number = re.search(r"/tf\.math\.round(?:_(\d+))?/", flat.name(index)) if kind == "ROUND" else None
            flat.tensor(index).name = rounds[int(number[1] or 0)] if number else f"{kind.lower()}_{index}"
    for name, indices in ((INPUT_NAME, flat.graph.inputs), (OUTPUT_NAME, flat.graph.outputs)):
        for index in indices:
            flat.tensor(index).name = name
    flat.graph.name = "network"
