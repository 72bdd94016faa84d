"""Take TruncQuant networks to ONNX and TFLite with their 8-bit codes and the shift intact, and prove it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqexport.checkpoint import load_checkpoint, save_checkpoint
    from tqexport.layers import (
        ActivationQuantizer,
        SwitchableBatchNorm1d,
        SwitchableBatchNorm2d,
        TruncConv1d,
        TruncConv2d,
        TruncLinear,
        at_width,
        set_quantizer,
    )
    from tqexport.options import ReadOptions
    from tqexport.preparation import prepare
    from tqexport.qat import calibrate_batch_norms, joint_backward, load_float_weights
    from tqexport.trunc_model import CheckpointInfo, Normalization, TruncModel
    from tqexport.truncation import Scheme

__all__ = [
    "ActivationQuantizer",
    "CheckpointInfo",
    "Normalization",
    "ReadOptions",
    "Scheme",
    "SwitchableBatchNorm1d",
    "SwitchableBatchNorm2d",
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

_HOME = {
    "CheckpointInfo": "trunc_model",
    "Normalization": "trunc_model",
    "ReadOptions": "options",
    "Scheme": "truncation",
    "TruncModel": "trunc_model",
    "calibrate_batch_norms": "qat",
    "joint_backward": "qat",
    "load_checkpoint": "checkpoint",
    "load_float_weights": "qat",
    "prepare": "preparation",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import the public names when first used, so that ``tqexport --help`` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'layers')}"), name)
