"""Quantisation-aware training around the layers: one loss over several widths, BatchNorms for the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from tqexport.errors import UsageError
from tqexport.layers import at_width, switchable_batch_norms

__all__ = ["calibrate_batch_norms", "joint_backward"]


def joint_backward(
    model: nn.Module, inputs: Tensor, targets: Tensor, widths: Sequence[int], loss: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Add the gradients of the loss at every width; call it between ``zero_grad`` and ``step``.

    Args:
        model: A prepared network in training mode.
        inputs: float32 (N, ...).
        targets: What ``loss`` compares with.
        widths: The widths trained jointly.
        loss: ``loss(outputs, targets)``, a scalar.

    Returns:
        The mean loss over the widths.
    """
    total = 0.0
    for bits in widths:
        with at_width(model, bits):
            value = loss(model(inputs), targets)
        torch.autograd.backward(value)
        total += float(value.detach())
    return total / len(widths)


def calibrate_batch_norms(model: nn.Module, batches: Iterable[Tensor], widths: Sequence[int]) -> None:
    """Give widths that were not trained a BatchNorm of their own.

    Gain and shift come from the next trained width above (or the highest one), mean and variance from ``batches``
    at the new width. Every other BatchNorm stays as it is.

    Args:
        model: A prepared network; its mode is kept.
        batches: Input batches, float32 (N, ...), as the network is trained with. Read once per width.
        widths: The new widths.

    Raises:
        UsageError: A width has a BatchNorm already, or ``batches`` is empty.
    """
    batches = list(batches)
    if not batches:
        raise UsageError("BatchNorm calibration needs at least one batch")
    trained = {name: norm.widths for name, norm in switchable_batch_norms(model).items()}
    was_training = model.training
    for bits in widths:
        for name, norm in switchable_batch_norms(model).items():
            if bits in norm.widths:
                raise UsageError(f"{name} has a BatchNorm for {bits} bits already")
            source = min((width for width in trained[name] if width > bits), default=max(trained[name]))
            fresh = copy.deepcopy(norm.bn_dict[str(source)])
            assert isinstance(fresh, nn.modules.batchnorm._BatchNorm)
            fresh.reset_running_stats()
            fresh.momentum = None  # a plain average over the batches
            norm.bn_dict[str(bits)] = fresh
        model.eval()
        for norm in switchable_batch_norms(model).values():
            norm.bn_dict[str(bits)].train()
        with torch.no_grad(), at_width(model, bits):
            for batch in batches:
                model(batch)
        model.train(was_training)
