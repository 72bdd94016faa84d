"""Are the codes in an artifact those of the checkpoint, element by element?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.layer_kinds import kind_of
from tqexport.model import TruncModel
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import codes_of_integers, direct_codes, max_code, normalize

__all__ = ["ExpectedCodes", "aligned", "compare_codes", "expected_codes", "first_index"]

Codes = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ExpectedCodes:
    """The codes of one quantised weight at a width, from the float weights directly.

    Attributes:
        layer: What people are told it is.
        codes: uint8, the shape of the weight.
        output_axis: The axis that counts output channels, 0 or 1.
    """

    layer: str
    codes: npt.NDArray[np.uint8]
    output_axis: int


def expected_codes(model: TruncModel, bits: int) -> dict[str, ExpectedCodes]:
    """The codes of each quantised weight by name (``layers.0.conv0.weight``)."""
    expected = {}
    for name, weight in quantized_weights(model.module).items():
        codes = direct_codes(normalize(weight.original.detach()), bits, weight.scheme.quantizer).byte().numpy()
        kind = kind_of(weight.module)
        expected[name] = ExpectedCodes(weight.layer, codes, kind.output_axis if kind else 0)
    return expected


def compare_codes(
    expected: Mapping[str, ExpectedCodes], bits: int, codes: Mapping[str, list[Codes]], problems: dict[str, str]
) -> tuple[int, int]:
    """Compare the codes of every quantised weight.

    Args:
        expected: What the checkpoint gives.
        bits: The width of the artifact.
        codes: What the artifact has; see :class:`tqexport.backends.running.RuntimeRun`.
        problems: Gets a sentence for each layer that differs, by layer.

    Returns:
        Number of codes compared, and of those that differ.
    """
    total = wrong = 0
    for name, weight in expected.items():
        layer, size = weight.layer, weight.codes.size
        places = codes.get(name, [])
        if not places:
            problems[layer] = f"layer {layer} has no codes in the file"
        for stored in places:
            total += size
            own = aligned(weight.codes, stored, bits, weight.output_axis)
            if own is None:
                wrong += size
                problems[layer] = f"layer {layer}: the codes have shape {stored.shape}, not {weight.codes.shape}"
            elif (differs := own != weight.codes).any():
                wrong += int(differs.sum())
                index = first_index(differs)
                problems[layer] = (
                    f"layer {layer}: {int(differs.sum())} of {size} codes differ, first at {index}: "
                    f"{own[index]} where PyTorch has {weight.codes[index]}"
                )
    return total, wrong


def first_index(mask: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Index of the first element that is true."""
    return tuple(int(i) for i in np.argwhere(mask)[0])


def aligned(expected: Codes, stored: Codes, bits: int, output_axis: int = 0) -> Codes | None:
    """Codes of an artifact in the form that PyTorch has them in; None where the shapes do not fit.

    Args:
        expected: The codes to compare with, 0 to ``M_b``, in the shape of the weight.
        stored: uint8 codes, or integers in the place of codes. Integers may be of more input channels, and an output
            channel whose gain is negative is turned round, ``u -> M_b - u``: of the two readings of each output channel
            the one with fewer differences is taken.
        bits: The width.
        output_axis: The axis that counts output channels, 0 or 1.

    Returns:
        Codes, the shape of ``expected``.
    """
    if stored.dtype == np.uint8:
        # TFLite keeps an axis of 1 through 1-D convolutions.
        return stored.reshape(expected.shape) if stored.size == expected.size else None
    if expected.ndim < 2:  # which has no axis of output channels
        return None
    inputs = 1 - output_axis
    of_the_layer = np.take(stored, np.arange(min(expected.shape[inputs], stored.shape[inputs])), axis=inputs)
    if of_the_layer.size != expected.size:
        return None
    straight = codes_of_integers(of_the_layer.reshape(expected.shape), bits)
    turned = max_code(bits) - straight
    others = tuple(axis for axis in range(expected.ndim) if axis != output_axis)
    is_turned = (turned != expected).sum(others, keepdims=True) < (straight != expected).sum(others, keepdims=True)
    return np.where(is_turned, turned, straight)
