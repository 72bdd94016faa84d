"""What grids cost: the same samples before and after calibration, at every width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tqexport.model import TruncModel

__all__ = ["WidthPrice", "price_of_grids"]

_BATCH = 64

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WidthPrice:
    """One width before and after calibration.

    Attributes:
        bits: The weight width.
        before: Share of the labels that were met before, 0 to 1; None without labels.
        after: Share that is met after.
        agreement: Share of samples whose largest output is the same.
        error: Root mean square of the difference of the outputs, as a share of that of the outputs before.
    """

    bits: int
    before: float | None
    after: float | None
    agreement: float
    error: float


def price_of_grids(
    model: TruncModel,
    calibrated: TruncModel,
    inputs: Values,
    labels: npt.NDArray[np.int64] | None = None,
    widths: Sequence[int] = (),
) -> list[WidthPrice]:
    """Compare a network with its calibrated form.

    Args:
        model: Before.
        calibrated: After, see :func:`tqexport.integer.calibration.calibrate`.
        inputs: float32 (N, *input_shape), normalised; better not those that the grids were found from.
        labels: Class of each sample (N,), if known.
        widths: Default: every width of the network.
    """
    prices = []
    for bits in widths or model.info.widths:
        first, second = (_outputs(network, bits, inputs) for network in (model, calibrated))
        chosen = [outputs.reshape(len(outputs), -1).argmax(1) for outputs in (first, second)]
        met = [float((classes == labels).mean()) if labels is not None else None for classes in chosen]
        size = float(np.sqrt(np.square(first.astype(np.float64)).mean()))
        error = float(np.sqrt(np.square(second.astype(np.float64) - first).mean()))
        same = float((chosen[0] == chosen[1]).mean())
        prices.append(WidthPrice(bits, met[0], met[1], same, error / size if size else 0.0))
    return prices


def _outputs(model: TruncModel, bits: int, inputs: Values) -> Values:
    """What a network answers at a width."""
    with torch.no_grad(), model.at_width(bits) as network:
        parts = [network(torch.from_numpy(inputs[i : i + _BATCH])).numpy() for i in range(0, len(inputs), _BATCH)]
    return np.concatenate(parts)
