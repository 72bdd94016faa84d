"""The trained fixture, and its exports at every width: made once for all tests and all workers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from captures import Captures
from places import DIGITS, DIGITS_DATA, artifact, made_once
from warm_converter import WarmConverter

from tqexport import ReadOptions, TruncModel, load_checkpoint
from tqexport.artifacts.project import open_project
from tqexport.backends.onnx import export
from tqexport.backends.onnx.runtime_file import merge_onnx
from tqexport.backends.tflite import onnx2tf, template
from tqexport.backends.tflite.onnx2tf import run_onnx2tf, run_worker
from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite
from tqexport.verification.run import load_samples

WIDTHS = range(1, 9)


class LabelledInputs(NamedTuple):
    """Samples of a network of one input: float32 (N, ...), and int64 (N,)."""

    inputs: np.ndarray
    labels: np.ndarray


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def each_graph_is_converted_once(tmp_path_factory: pytest.TempPathFactory):
    """onnx2tf takes seconds and depends on nothing but the graphs that it is given: what it wrote is kept.

    The codes, the scales and everything else that tqexport puts in afterwards is made anew in every test.
    """

    def kept(models, samples):
        contents = [model.SerializeToString(deterministic=True) for model in models]
        contents += [value.tobytes() for each in samples for value in each]
        key = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()[:16]

        def make(folder):
            for number, content in enumerate(run_onnx2tf(models, samples)):
                (folder / f"{number}.tflite").write_bytes(content)

        folder = made_once(tmp_path_factory, f"onnx2tf-{key}", make)
        return [(folder / f"{number}.tflite").read_bytes() for number in range(len(models))]

    warm = WarmConverter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "run_onnx2tf", kept)
        patch.setattr(onnx2tf, "run_worker", warm.run_worker)
        yield
    warm.close()


@pytest.fixture(scope="session", autouse=True)
def each_network_is_captured_once():
    """torch.export takes seconds, and what it gives depends on the structure of a network alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "capture", Captures(export.capture))
        yield


@pytest.fixture
def converted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose subject is the conversion itself, in a process of its own."""
    monkeypatch.setattr(template, "run_onnx2tf", run_onnx2tf)
    monkeypatch.setattr(onnx2tf, "run_worker", run_worker)


@pytest.fixture(scope="session")
def digits() -> TruncModel:
    return load_checkpoint(DIGITS)


@pytest.fixture(scope="session")
def digits_samples(digits: TruncModel) -> LabelledInputs:
    samples = load_samples(DIGITS_DATA, digits)
    return LabelledInputs(samples.inputs[0], samples.labels)


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``ckpt.pt`` and ``out/``, every width as ONNX and TFLite; tests leave it as it is."""

    def make(folder: Path) -> None:
        shutil.copy(DIGITS, folder / "ckpt.pt")
        project = open_project(folder / "ckpt.pt", folder / "out", ReadOptions())
        for backend in ("onnx", "tflite"):
            list(project.export(backend, WIDTHS))

    return made_once(tmp_path_factory, "exported", make)


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    """A copy of ``exported_once`` that the test may damage."""
    return Path(shutil.copytree(exported_once, tmp_path / "exported"))


@pytest.fixture(scope="session")
def calibrated(digits: TruncModel, digits_samples: LabelledInputs) -> TruncModel:
    """The digits network with grids, found from other samples than ``held_out``."""
    from tqexport.integer.calibration import calibrate

    return calibrate(digits, digits_samples.inputs[:200])


@pytest.fixture(scope="session")
def symmetric(digits: TruncModel, digits_samples: LabelledInputs) -> TruncModel:
    """The digits network with grids that have zero in the middle."""
    from tqexport.integer.calibration import calibrate

    return calibrate(digits, digits_samples.inputs[:200], symmetric=True)


@pytest.fixture(scope="session")
def held_out(digits_samples: LabelledInputs) -> np.ndarray:
    """Samples that the grids were not found from."""
    return digits_samples.inputs[200:]


@pytest.fixture(scope="session")
def runtime_files(exported_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``ckpt.onnx`` and ``ckpt.tflite``, each of every width; tests leave it as it is."""

    def make(folder: Path) -> None:
        contents = {bits: artifact(exported_once, "onnx", bits) for bits in WIDTHS}
        (folder / "ckpt.onnx").write_bytes(merge_onnx(contents.items()))
        models = [onnx.load_from_string(content) for content in contents.values()]
        (folder / "ckpt.tflite").write_bytes(convert_to_runtime_tflite(models)[0])

    return made_once(tmp_path_factory, "runtime", make)


@pytest.fixture(scope="session")
def runtime_onnx(runtime_files: Path) -> bytes:
    return (runtime_files / "ckpt.onnx").read_bytes()


@pytest.fixture(scope="session")
def runtime_tflite(runtime_files: Path) -> bytes:
    return (runtime_files / "ckpt.tflite").read_bytes()
