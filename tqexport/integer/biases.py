"""Biases that are whole numbers of what an integer sum counts in, in the PyTorch network itself.

A convolution's int32 bias counts in ``input scale * weight scale``, which at low widths is coarse enough to change
levels. So calibration moves the bias of each BatchNorm to the nearest such number, and the network that PyTorch runs is
the one that integers run. A BatchNorm that several widths share stays as it is, as does a layer's own bias: what they
lose is counted by verification like any other difference.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tqexport.integer.build import integer_model
from tqexport.integer.capture import capture_calls, norm_of
from tqexport.integer.model import Convolution
from tqexport.integer.plan import plan_of
from tqexport.model import TruncModel
from tqexport.training.layers import switchable_batch_norms

__all__ = ["round_biases"]


def round_biases(model: TruncModel, bits: int) -> None:
    """Move the BatchNorm biases of one width to whole numbers of their sums.

    Args:
        model: A network with grids; changed in place.
        bits: The weight width.
    """
    widths = [model.info.batch_norm_width(width) for width in model.info.widths]
    if widths.count(model.info.batch_norm_width(bits)) > 1:
        return  # moved for one width, it would be off for another
    integers = integer_model(model, bits)
    layers = {layer.name: layer for layer in integers.operations if isinstance(layer, Convolution)}
    with model.at_width(bits) as network, torch.no_grad():
        per_width = set(map(id, switchable_batch_norms(network).values()))
        for step in plan_of(capture_calls(network, model.info.input_shape)).steps:
            norm = step.call if step.call.kind == "batch_norm" else step.norm
            if norm is None or id(norm.module) not in per_width:
                continue
            live, layer = norm_of(norm.module), layers[step.call.name]
            unit = np.float64(np.float32(integers.grids[layer.inputs[0]].scale)) * layer.scale.astype(np.float64)
            assert isinstance(live.running_mean, Tensor)
            assert isinstance(live.running_var, Tensor)
            mean = live.running_mean.double().numpy()
            gain = live.weight.double().numpy() / np.sqrt(live.running_var.double().numpy() + live.eps)
            own = getattr(step.call.module, "bias", None) if norm is step.norm else None
            inside = (own.detach().double().numpy() if isinstance(own, Tensor) else 0.0) - mean
            live.bias.copy_(torch.from_numpy(layer.bias * unit - inside * gain))
