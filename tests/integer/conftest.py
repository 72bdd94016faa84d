"""The digits network with grids, found once from samples it was not tested on."""

from __future__ import annotations

import numpy as np
import pytest

from tqexport import TruncModel
from tqexport.integer.calibration import calibrate
from tqexport.verification.run import Samples


@pytest.fixture(scope="session")
def calibrated(digits: TruncModel, digits_samples: Samples) -> TruncModel:
    return calibrate(digits, digits_samples.inputs[:200])


@pytest.fixture(scope="session")
def held_out(digits_samples: Samples) -> np.ndarray:
    return digits_samples.inputs[200:]
