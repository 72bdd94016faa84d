"""Running onnx2tf in a process of its own."""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.errors import ConversionError, HostError
from tqexport.files import temporary_folder

__all__ = ["Samples", "check_converter", "ends", "in_converters_order", "run_onnx2tf", "run_worker"]

Samples = Sequence[npt.NDArray[Any]]

_NO_SPACE = tuple(map(os.strerror, (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)))
_log = logging.getLogger(__name__)


def check_converter() -> None:
    """Make sure that what converts to TFLite is there, before any slow work; it runs in a process of its own.

    Raises:
        HostError: A package is missing.
    """
    for package in ("onnx2tf", "tensorflow", "tf_keras"):
        try:
            installed = importlib.util.find_spec(package) is not None
        except ValueError:  # somebody put None in the place of the module
            installed = False
        if not installed:
            raise HostError(
                f"conversion to TFLite needs {package}, which is not installed: pip install 'tqexport[tflite]'"
            )


def in_converters_order(model: onnx.ModelProto) -> list[str]:
    """Names of the operators of a float network, in the order in which onnx2tf converts them.

    sng4onnx, which it calls first, sorts them.
    """
    import sng4onnx

    return [str(node.name) for node in sng4onnx.generate(onnx_graph=model, non_verbose=True).graph.node]


def ends(flat: FlatModel) -> tuple[dict[str, int], dict[str, int]]:
    """Which value is which input, by name, and which output, by ``output_0``, ``output_1`` and so on.

    A signature says it, except of networks that TensorFlow cannot save as a model first, such as those with grouped
    convolutions; their outputs are called ``Identity``, ``Identity_1`` and so on.
    """
    for signature in flat.model.signatureDefs or ():
        given, returned = (
            {entry.name.decode(): int(entry.tensorIndex) for entry in part}
            for part in (signature.inputs, signature.outputs)
        )
        return given, returned
    given = {flat.name(index): index for index in map(int, flat.graph.inputs)}
    returned = {}
    for index in map(int, flat.graph.outputs):
        if number := re.fullmatch(r"Identity(?:_(\d+))?", flat.name(index)):
            returned[f"output_{number[1] or 0}"] = index
    return given, returned


def run_onnx2tf(models: Sequence[onnx.ModelProto], samples: Sequence[Samples]) -> list[bytes]:
    """Convert float networks to float TFLite files, in one process of their own.

    Args:
        models: The networks.
        samples: For each, what onnx2tf tries it on, an array for each input. Where it does not know in which order an
            operator has its axes, it takes the order that gives what onnxruntime gives.

    Raises:
        ConversionError: onnx2tf cannot convert one; the message has its last words and the operator, where it says it.
        HostError: There is no space for temporary files.
    """
    contents = (model.SerializeToString(deterministic=True) for model in models)
    return list(_converted(tuple(zip(contents, map(_packed, samples), strict=True))))


def _packed(samples: Samples) -> bytes:
    """Arrays as the content of an NPZ file, in their order; the same give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, *samples)
    return buffer.getvalue()


# The kernels and the run-time file of one network have the same graph, and may need two conversions.
@functools.lru_cache(maxsize=2)
def _converted(networks: tuple[tuple[bytes, bytes], ...]) -> tuple[bytes, ...]:
    """The TFLite files of serialised ONNX models and their samples; what was converted last is kept."""
    with temporary_folder() as folder:
        sources = [folder / f"{i}.onnx" for i in range(len(networks))]
        targets = [source.with_suffix(".tflite") for source in sources]
        for (model, samples), source in zip(networks, sources, strict=True):
            source.write_bytes(model)
            source.with_suffix(".npz").write_bytes(samples)
        pairs = [str(path) for pair in zip(sources, targets, strict=True) for path in pair]
        returncode, printed = run_worker(folder, pairs)
        _log.debug("onnx2tf printed:\n%s", printed)
        if (full := [word for word in _NO_SPACE if word in printed]) and returncode:
            raise HostError(f"cannot write a temporary file: {full[0]}; make space in {folder.parent}")
        if returncode or not all(target.is_file() for target in targets):
            raise ConversionError(f"onnx2tf could not convert the network: {_last_words(returncode, printed)}")
        return tuple(target.read_bytes() for target in targets)


def run_worker(folder: Path, pairs: Sequence[str]) -> tuple[int, str]:
    """Run :mod:`tqexport.backends.tflite.onnx2tf_worker` in a folder; returns its exit code and what it printed."""
    with subprocess.Popen(
        [sys.executable, "-m", "tqexport.backends.tflite.onnx2tf_worker", *pairs],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},  # whatever the libraries leave behind goes with the folder
        stdin=subprocess.PIPE,  # never written to; it ends with this process, and the worker with it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            assert process.stdout is not None
            printed = process.stdout.read().decode(errors="replace")
            process.wait()
        finally:  # an interrupt must not leave TensorFlow working on
            process.kill()
    return process.returncode, printed


def _last_words(returncode: int, printed: str) -> str:
    """What a failed process says of the cause, on one line."""
    if returncode < 0:
        return f"it was ended by {signal.Signals(-returncode).name} (is there enough memory?)"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    operator = re.search(r"onnx_op_name: (\S+)", printed)
    where = f"at {operator[1]}: " if operator else ""
    return where + (telling or lines or ["it printed nothing"])[-1][:300] + " (--verbose shows all that it printed)"
