"""Are the codes in an artifact those of the checkpoint, element by element?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.tflite.codes import integer_codes
from tqexport.model import TruncModel
from tqexport.training.quantizers import quantized_weights
from tqexport.truncation import direct_codes, max_code, normalize
from tqexport.verification.runtimes import RuntimeRun

__all__ = ["compare_codes", "expected_codes"]

Codes = npt.NDArray[np.uint8]


def expected_codes(model: TruncModel, bits: int) -> dict[str, Codes]:
    """The codes of each quantised weight by name, from the float weights directly; uint8, the shape of the weight."""
    return {
        name: direct_codes(normalize(weight.original.detach()), bits, weight.scheme.quantizer).byte().numpy()
        for name, weight in quantized_weights(model.module).items()
    }


def compare_codes(model: TruncModel, bits: int, run: RuntimeRun, problems: dict[str, str]) -> tuple[int, int]:
    """Compare the codes of every quantised layer.

    Args:
        model: The reference.
        bits: The width of the artifact.
        run: What the runtime found in the file.
        problems: Gets a sentence for each layer that differs.

    Returns:
        Number of codes compared, and of those that differ.
    """
    total = wrong = 0
    for name, expected in expected_codes(model, bits).items():
        layer = name.removesuffix(".weight")
        places = run.codes.get(name, [])
        if not places:
            problems[layer] = f"layer {layer} has no codes in the file"
        for found in places:
            total += expected.size
            pair = _aligned(expected, found, bits)
            if pair is None:
                wrong += expected.size
                problems[layer] = f"layer {layer}: the codes have shape {found.shape}, not {expected.shape}"
            elif (differs := pair[0] != pair[1]).any():
                wrong += int(differs.sum())
                index = tuple(int(i) for i in np.argwhere(differs)[0])
                problems[layer] = (
                    f"layer {layer}: {int(differs.sum())} of {expected.size} codes differ, first at {index}: "
                    f"{pair[1][index]} where PyTorch has {pair[0][index]}"
                )
    return total, wrong


def _aligned(expected: Codes, found: npt.NDArray[Any], bits: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Both in the same form and shape; None where the shapes do not fit."""
    if found.dtype == np.uint8:
        # TFLite keeps an axis of 1 through 1-D convolutions.
        return (expected, found.reshape(expected.shape)) if found.size == expected.size else None
    # Stored integers: behind the layer's input channels there may be one more.
    found = found[:, : expected.shape[1]]
    if found.size != expected.size:
        return None
    found = found.reshape(expected.shape)
    # An output channel with a negative gain is turned round, u -> M_b - u.
    straight, turned = (integer_codes(codes, bits) for codes in (expected, max_code(bits) - expected))
    axes = tuple(range(1, expected.ndim))
    is_turned = (found != turned).sum(axes, keepdims=True) < (found != straight).sum(axes, keepdims=True)
    return np.where(is_turned, turned, straight), found
