"""The trained fixture, and its exports at every width made once for all tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tqexport import ReadOptions, TruncModel, load_checkpoint
from tqexport.artifacts.project import open_project
from tqexport.verification.run import Samples, load_samples

FIXTURES = Path(__file__).parent.parent / "fixtures"
DIGITS = FIXTURES / "digits-resnet8.pt"
DIGITS_DATA = FIXTURES / "digits-test.npz"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> TruncModel:
    return load_checkpoint(DIGITS)


@pytest.fixture(scope="session")
def digits_samples(digits: TruncModel) -> Samples:
    return load_samples(DIGITS_DATA, digits)


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    shutil.copy(DIGITS, folder / "ckpt.pt")
    project = open_project(folder / "ckpt.pt", folder / "out", ReadOptions())
    list(project.export("onnx", range(1, 9)))
    list(project.export("tflite", range(1, 9)))
    return folder


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    """A folder with ``ckpt.pt`` and ``out/``, every width as ONNX and TFLite; the test may damage it."""
    return Path(shutil.copytree(exported_once, tmp_path / "exported"))
