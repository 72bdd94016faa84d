"""Where the filters of a converted file come from.

The converter knows float32 weights alone, and what stands next to a layer may be folded into its filter: the BatchNorm
behind it, which multiplies each output channel by a gain, and the steps of the activation quantiser in front of it,
which divide the whole. So ``filter = weight * gain / steps``. Gain and steps are known from the passes that folded them
(``float_graph.py``) and from the template of the conversion (``template.py``). Only where the converter combined
parameters beyond recognition, so that there is no template, the gain is worked out from the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.layer_kinds import FILTER_OPERATORS

__all__ = ["FilterOrigin", "Folded", "filters", "guess_origins"]

Array = npt.NDArray[np.float32]
_FIT = 2e-6  # of a channel's largest weight: float32 rounding of two products. Half a step at 8 bits is 2e-3.


@dataclass(frozen=True)
class Folded:
    """A parameter of a float network that a pass computed: a weight times a gain per output channel.

    Attributes:
        weight: Name of the weight.
        gain: float32, one per output channel; None stands for 1.
    """

    weight: str
    gain: Array | None


@dataclass(frozen=True)
class FilterOrigin:
    """Where one filter comes from: ``weight * gain / steps``.

    Attributes:
        filter: Index of the filter's tensor.
        operator: Name of the operator that reads it.
        weight: Name of the weight.
        gain: One per output channel, float32; float64 where it was worked out. None stands for 1.
        steps: Number of steps of an activation quantiser.
    """

    filter: int
    operator: str
    weight: str
    gain: npt.NDArray[np.floating] | None = None
    steps: float = 1.0

    def total_gain(self, channels: int) -> npt.NDArray[np.float64]:
        """Gain and steps in one number per output channel."""
        gain = np.ones(channels) if self.gain is None else self.gain.astype(np.float64)
        return gain / self.steps


def filters(flat: FlatModel) -> dict[int, str]:
    """The filter tensors of the operators that multiply or look up, with the operator's name."""
    named = [(operator, flat.operator_name(operator)) for operator in flat.graph.operators]
    return {
        filter_: name
        for operator, name in named
        if (layout := FILTER_OPERATORS.get(name)) is not None
        # An operator that looks up may do so in anything.
        if len(flat.shape(filter_ := int(operator.inputs[layout.filter]))) == len(layout.axes)
    }


def guess_origins(flat: FlatModel, weights: Sequence[CodedWeight]) -> list[FilterOrigin]:
    """Work out from the numbers which filter is which quantised weight.

    Args:
        flat: The file as the converter wrote it.
        weights: The quantised weights of the network.

    Returns:
        The filters that are a weight times a gain per output channel, up to float32 rounding.
    """
    expected = {weight.name: weight.dequantized() for weight in weights}
    origins: list[FilterOrigin] = []
    for index, operator in filters(flat).items():
        value = flat.constant(index)
        if value is None or value.dtype != np.float32:
            continue
        layout = FILTER_OPERATORS[operator]
        for name, weight in expected.items():
            if weight.size != value.size:
                continue
            candidate = layout.from_torch(weight, value.shape).transpose(layout.axes)
            gain = _gain(value.transpose(layout.axes), candidate)
            if gain is not None:
                origins.append(FilterOrigin(index, operator, name, gain))
                break
    return origins


def _gain(filter_: Array, weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """``gain`` with ``filter_ == gain[:, None] * weight`` up to float32 rounding, or None if there is none."""
    gain = None
    for channels in (1, len(filter_)):  # most candidates do not fit in the first channel
        rows, reference = filter_[:channels].reshape(channels, -1), weight[:channels].reshape(channels, -1)
        gain = (rows * reference).sum(1) / (reference**2).sum(1)  # least squares
        if not (np.abs(rows - gain[:, None] * reference).max(1) <= _FIT * np.abs(rows).max(1)).all():
            return None
    return gain
