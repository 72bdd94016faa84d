"""Take TruncQuant networks to ONNX and TFLite with their 8-bit codes and the shift intact, and prove it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqexport.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from tqexport.checkpoints.options import ReadOptions
    from tqexport.model import CheckpointInfo, InputInfo, Normalization, TruncModel
    from tqexport.training.layers import (
        SwitchableBatchNorm1d,
        SwitchableBatchNorm2d,
        SwitchableBatchNorm3d,
        TruncConv1d,
        TruncConv2d,
        TruncLinear,
    )
    from tqexport.training.preparation import prepare
    from tqexport.training.qat import calibrate_batch_norms, joint_backward, load_float_weights
    from tqexport.training.quantizers import ActivationQuantizer, set_quantizer
    from tqexport.training.ranges import RangeQuantizer
    from tqexport.training.widths import at_width
    from tqexport.truncation import Scheme

__all__ = [
    "ActivationQuantizer",
    "CheckpointInfo",
    "InputInfo",
    "Normalization",
    "RangeQuantizer",
    "ReadOptions",
    "Scheme",
    "SwitchableBatchNorm1d",
    "SwitchableBatchNorm2d",
    "SwitchableBatchNorm3d",
    "TruncConv1d",
    "TruncConv2d",
    "TruncLinear",
    "TruncModel",
    "at_width",
    "calibrate_batch_norms",
    "joint_backward",
    "load_checkpoint",
    "load_float_weights",
    "prepare",
    "save_checkpoint",
    "set_quantizer",
]

_HOMES = {
    "checkpoints.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "checkpoints.options": ("ReadOptions",),
    "model": ("CheckpointInfo", "InputInfo", "Normalization", "TruncModel"),
    "training.preparation": ("prepare",),
    "training.qat": ("calibrate_batch_norms", "joint_backward", "load_float_weights"),
    "training.quantizers": ("ActivationQuantizer", "set_quantizer"),
    "training.ranges": ("RangeQuantizer",),
    "training.widths": ("at_width",),
    "truncation": ("Scheme",),
}


def __getattr__(name: str) -> Any:
    """Import the public names when first used, so that ``tqexport --help`` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "training.layers")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
