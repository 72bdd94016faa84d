"""Quantisation-aware training around the layers: one loss over several widths, and what comes before and after it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tqexport.errors import InputError, UsageError
from tqexport.integer.grids import grids_of
from tqexport.training.layers import switchable_batch_norms
from tqexport.training.quantizers import quantized_weights
from tqexport.training.ranges import ranges_of
from tqexport.training.widths import at_width

__all__ = [
    "Misfits",
    "calibrate_batch_norms",
    "joint_backward",
    "load_float_weights",
    "soft_cross_entropy",
    "truncation_alignment",
]

Loss = Callable[[Any, Any], Tensor]


def joint_backward(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    targets: Any,
    widths: Sequence[int],
    loss: Loss,
    *,
    distillation: float = 0.0,
    distillation_loss: Loss | None = None,
    alignment: float = 0.0,
    backward: Callable[[Tensor], object] = torch.autograd.backward,
) -> float:
    """Add the gradients of the loss at every width; call it between ``zero_grad`` and ``step``.

    With ``distillation`` d, every width but the highest minimises ``(1 - d) loss(y, targets) + d distillation_loss(y,
    y_top)``, where ``y_top`` are the outputs at the highest width of the same step, without gradient.

    Args:
        model: A prepared network in training mode.
        inputs: What the model takes, (N, ...); a sequence where it takes several.
        targets: What ``loss`` compares with.
        widths: The widths trained jointly.
        loss: ``loss(outputs, targets)``, a scalar.
        distillation: How much the lower widths learn from the highest one instead of from ``targets``, 0 to 1.
        distillation_loss: ``distillation_loss(outputs, outputs at the highest width)``, a scalar; default
            :func:`soft_cross_entropy`. Networks that are no classifiers want another, such as ``mse_loss``, and those
            with several outputs need one.
        alignment: Weight of :func:`truncation_alignment`, which is added once per call.
        backward: Called with each loss, e.g. ``accelerator.backward`` or
            ``lambda value: scaler.scale(value).backward()``.

    Returns:
        The mean loss over the widths, without the alignment.

    Raises:
        UsageError: ``widths`` is empty, ``distillation`` or ``alignment`` is out of range, or several outputs are
            distilled without a ``distillation_loss``.
    """
    if not widths:
        raise UsageError("joint training needs at least one width")
    if not 0 <= distillation <= 1 or alignment < 0:
        raise UsageError(f"distillation {distillation} must lie in [0, 1], and alignment {alignment} not be negative")
    from_teacher = distillation_loss or soft_cross_entropy
    teacher: Any = None
    total = 0.0
    for bits in sorted(widths, reverse=True) if distillation else widths:
        with at_width(model, bits):
            outputs = model(*_several(inputs))
        value = loss(outputs, targets)
        if teacher is not None:
            value = (1 - distillation) * value + distillation * from_teacher(outputs, teacher)
        elif distillation:
            if distillation_loss is None and not isinstance(outputs, Tensor):
                raise UsageError("the network has several outputs; say with distillation_loss how they are compared")
            teacher = tree_map(Tensor.detach, outputs)
        backward(value)
        total += float(value.detach())
    if alignment:
        backward(alignment * truncation_alignment(model, widths))
    return total / len(widths)


def _several(inputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """What a network is called with."""
    return (inputs,) if isinstance(inputs, Tensor) else inputs


def soft_cross_entropy(outputs: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy with the teacher's probabilities, times ``temperature`` squared (arXiv 1503.02531).

    Args:
        outputs: Logits (N, classes, ...), float32.
        teacher: Logits of the same shape.
        temperature: Divides both; above 1 the teacher's small probabilities count more.

    Returns:
        Scalar, the mean over samples.
    """
    probabilities = (teacher / temperature).softmax(1)
    return nn.functional.cross_entropy(outputs / temperature, probabilities) * temperature**2


def truncation_alignment(model: nn.Module, widths: Sequence[int]) -> Tensor:
    """How far the weights at the highest width are from those at the lower ones: a loss that pulls them together.

    The mean over layers and lower widths of ``mean((w_top - w_b)^2) / mean|w|^2``. The weights at the lower widths
    carry no gradient: with the straight-through estimator both sides have the same one, and it would cancel.

    Args:
        model: A prepared network.
        widths: Two widths or more, 1 to 8 or 32.

    Returns:
        Scalar, differentiable with respect to the weights; 0 where the weights of every width coincide.

    Raises:
        UsageError: There is one width alone, so that nothing can be aligned.
    """
    top, lower = max(widths), sorted({*widths} - {max(widths)})
    if not lower:
        raise UsageError(f"alignment is between widths, and {top} bits is the only one")
    distances = []
    for weight in quantized_weights(model).values():
        with at_width(weight.quantizer, top):
            highest = weight.quantized()
        for bits in lower:
            with at_width(weight.quantizer, bits), torch.no_grad():
                target = weight.quantized()
            distances.append((highest - target).square().mean() / weight.original.detach().abs().mean().square())
    return torch.stack(distances).mean()


@dataclass(frozen=True)
class Misfits:
    """The keys by which a float checkpoint and a prepared network do not fit each other.

    Attributes:
        missing: Keys of the network, without the width of a BatchNorm, that the checkpoint lacks; left as they were.
        unexpected: Keys of the checkpoint that the network lacks; not used.
        mismatched: Keys whose shapes differ; left as they were.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = (f"{kind} {', '.join(keys)}" for kind, keys in vars(self).items() if keys)
        return "; ".join(parts) or "everything fits"


def load_float_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> Misfits:
    """Start fine-tuning from a float checkpoint: copy its tensors into a prepared network.

    The BatchNorm of the checkpoint goes to every width. A ``module.`` in front of every key, which DataParallel leaves,
    is taken off.

    Args:
        model: A prepared network, as the float one was before ``prepare``; changed in place.
        state_dict: That of the float network.
        strict: Refuse a checkpoint that does not fit. Otherwise what fits is copied, e.g. everything but a classifier
            of other classes.

    Returns:
        What did not fit, by name.

    Raises:
        InputError: Something does not fit and ``strict`` is on, or nothing fits at all. The network is unchanged.

    Example:
        >>> from tqexport import prepare
        >>> trained = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> network = prepare(trained, widths=(2, 8), float_layers=["3"])
        >>> print(load_float_weights(network, trained.state_dict()))
        everything fits
    """
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    targets: dict[str, list[Tensor]] = {}
    grids = grids_of(model)
    # What no float network has.
    own = {id(value) for value in grids.buffers()} if grids is not None else set()
    own |= {id(quantizer.range) for quantizer in ranges_of(model).values()}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in own:
            continue
        targets.setdefault(_float_key(key), []).append(value)
    shared = {key: state_dict[key] for key in targets if key in state_dict}
    mismatched = tuple(key for key, value in shared.items() if value.shape != targets[key][0].shape)
    misfits = Misfits(
        missing=tuple(key for key in targets if key not in shared and not key.endswith("num_batches_tracked")),
        unexpected=tuple(key for key in state_dict if key not in targets),
        mismatched=mismatched,
    )
    if len(shared) == len(mismatched) or (strict and misfits):
        advice = "; with strict=False what fits is taken" if len(shared) > len(mismatched) else ""
        raise InputError(f"the float checkpoint does not fit the network: {misfits}{advice}")
    with torch.no_grad():
        for key, value in shared.items():
            for target in targets[key] if key not in mismatched else ():
                target.copy_(value)
    return misfits


def _float_key(key: str) -> str:
    """The key that a prepared network's tensor has in the float network: ``bn.bn_dict.4.bias`` is ``bn.bias`` there."""
    return re.sub(r"\bbn_dict\.\d+\.", "", key)


def calibrate_batch_norms(
    model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]], widths: Sequence[int]
) -> None:
    """Give widths that were not trained a BatchNorm of their own.

    Gain and shift come from the next trained width above (or the highest one), mean and variance from ``batches``
    at the new width, and so do the grids of a network that was prepared with ``integer``. Everything else stays as it
    is.

    Args:
        model: A prepared network; its mode is kept.
        batches: Inputs (N, ...) as the network is trained with; a sequence each where it takes several.
        widths: The new widths.

    Raises:
        UsageError: A width has a BatchNorm already, or ``batches`` is empty.
    """
    batches = list(batches)
    if not batches:
        raise UsageError("BatchNorm calibration needs at least one batch")
    norms = switchable_batch_norms(model)
    for name, norm in norms.items():
        if known := sorted({*widths} & {*norm.widths}):
            raise UsageError(f"{name} has a BatchNorm for {', '.join(map(str, known))} bits already")
    trained = {name: norm.widths for name, norm in norms.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    grids = grids_of(model)
    if grids is not None:
        grids.add_widths(widths)
        grids.train()
    for bits in widths:
        fresh: list[tuple[nn.modules.batchnorm._BatchNorm, float | None]] = []
        for name, norm in norms.items():
            source = min((width for width in trained[name] if width > bits), default=max(trained[name]))
            added = copy.deepcopy(norm.bn_dict[str(source)])
            assert isinstance(added, nn.modules.batchnorm._BatchNorm)
            norm.bn_dict[str(bits)] = added
            fresh.append((added.train(), added.momentum))
            added.reset_running_stats()
            added.momentum = None  # a plain average over the batches
            modes[added] = modes[norm]
        with torch.no_grad(), at_width(model, bits):
            for batch in batches:
                model(*_several(batch))
        for added, momentum in fresh:
            added.eval().momentum = momentum
    for module, mode in modes.items():
        module.training = mode
