"""Where the filters of a converted file come from.

The converter knows float32 weights alone, and what stands next to a layer may be folded into its filter: what
multiplies each output channel behind it, such as a BatchNorm, and the steps of the activation quantiser in front of it,
which divide the whole. So ``filter = weight * gain / steps``. Gain and steps are known from the passes that folded them
(``float_graph.py``) and from the template of the conversion (``fingerprints.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.layer_kinds import FILTER_OPERATORS

__all__ = ["FilterOrigin", "Folded", "filters"]

Array = npt.NDArray[np.float32]


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
    """Where one filter comes from: ``weight * gain * ... / steps``.

    Attributes:
        filter: Index of the filter's tensor.
        operator: Name of the operator that reads it.
        weight: Name of the weight.
        gains: What it is multiplied by, one after the other: one per output channel, or one for all of them; float32,
            or float64 where it was worked out from a run-time file.
        steps: Number of steps of an activation quantiser.
    """

    filter: int
    operator: str
    weight: str
    gains: tuple[npt.NDArray[np.floating], ...] = ()
    steps: float = 1.0

    def total_gain(self, channels: int) -> npt.NDArray[np.float64]:
        """Gains and steps in one number per output channel."""
        total = np.ones(channels)
        for gain in self.gains:
            total *= gain
        return total / self.steps


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
