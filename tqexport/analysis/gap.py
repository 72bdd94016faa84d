"""The quantisation-truncation gap: what changes where 8-bit codes are shifted instead of quantising anew.

A quantiser that floors has none: shifting its 8-bit codes gives the codes of every lower width. One that rounds has:
``round(M_8 x) >> (8 - b)`` is not ``round(M_b x)``, and what was trained is not what runs (arXiv 2506.11431).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tqexport.deploy import StoredParameter, deploy
from tqexport.errors import HostError, UsageError, about
from tqexport.files import atomic_path, ensure_folder
from tqexport.model import TruncModel
from tqexport.outputs import run_network
from tqexport.training.quantizers import QuantizedWeight, quantized_weights
from tqexport.truncation import STORED_BITS, Scheme, StoredWeight, affine, direct_codes, normalize, truncate

if TYPE_CHECKING:
    from tqexport.backends.running import Batch

__all__ = ["AccuracyGap", "Gap", "WeightGap", "WidthGap", "check_plot", "deploy_truncated", "measure_gap", "plot_gap"]

PLOT_SUFFIXES = (".pdf", ".png", ".svg")
_BATCH = 256


@dataclass(frozen=True)
class WeightGap:
    """Shifted against quantised, over the weights of a layer or of a network.

    Attributes:
        weights: How many there are.
        changed: How many codes differ.
        error: Root mean square of the difference of the weights, as a share of that of the quantised weights.
    """

    weights: int
    changed: int
    error: float

    @property
    def changed_share(self) -> float:
        """Share of the codes that differ, 0 to 1."""
        return self.changed / self.weights


@dataclass(frozen=True)
class AccuracyGap:
    """The whole network with quantised and with shifted codes, on the same samples.

    Attributes:
        samples: How many there are.
        agreement: Share of samples on which both ways have the same largest output.
        quantized: Share classified right with the weights quantised to the width; None without labels.
        truncated: The same with the 8-bit codes shifted.
    """

    samples: int
    agreement: float
    quantized: float | None
    truncated: float | None


@dataclass(frozen=True)
class WidthGap:
    """The gap at one width.

    Attributes:
        bits: The width.
        total: Over all quantised layers, with the quantiser of the checkpoint.
        layers: By layer name.
        rounded_total: What the same weights would have with a quantiser that rounds (``dorefa``); equal to ``total``
            where the checkpoint's rounds.
        rounded_layers: By layer name.
        accuracy: On data, if there are any; with the quantiser of the checkpoint.
    """

    bits: int
    total: WeightGap
    layers: Mapping[str, WeightGap]
    rounded_total: WeightGap
    rounded_layers: Mapping[str, WeightGap]
    accuracy: AccuracyGap | None = None


@dataclass(frozen=True)
class Gap:
    """The gap of a network.

    Attributes:
        quantizer: Of the checkpoint.
        widths: One entry per width, in the order asked for.
    """

    quantizer: str
    widths: tuple[WidthGap, ...]

    @property
    def closed(self) -> bool:
        """Whether shifting gives exactly what quantising gives, at every width measured."""
        return not any(width.total.changed for width in self.widths)


def measure_gap(
    model: TruncModel,
    widths: Sequence[int],
    inputs: Batch | None = None,
    labels: npt.NDArray[np.int64] | None = None,
) -> Gap:
    """Measure what shifting the 8-bit codes changes.

    Args:
        model: A loaded checkpoint.
        widths: Widths that it has.
        inputs: An array (N, *shape) for each input, normalised; runs the network both ways.
        labels: Class of each sample by the first output, (N,).

    Raises:
        InputError: The checkpoint lacks a width, or bias correction is undefined for a layer.
    """
    for bits in widths:
        model.check_width(bits)
    rounding = replace(model.info.scheme, quantizer="dorefa")
    gaps = []
    for bits in widths:
        layers, total = _weight_gaps(model, bits, model.info.scheme)
        rounded_layers, rounded_total = _weight_gaps(model, bits, rounding)
        accuracy = None if inputs is None else _accuracy_gap(model, bits, inputs, labels)
        gaps.append(WidthGap(bits, total, layers, rounded_total, rounded_layers, accuracy))
    return Gap(model.info.scheme.quantizer, tuple(gaps))


def deploy_truncated(model: TruncModel, bits: int) -> nn.Module:
    """The network as it runs where its 8-bit codes are shifted, whether it was trained for that or not.

    For ``truncquant`` this is :func:`tqexport.deploy.deploy`. For ``dorefa`` it is what must not be deployed, to
    measure what it costs; no export makes such a file.

    Raises:
        InputError: The checkpoint lacks the width, or bias correction is undefined for a layer.
    """
    deployed = deploy(model, bits)
    for weight in quantized_weights(model.module).values():
        truncated = StoredParameter(_truncated(weight, bits, weight.scheme))
        place = f"{weight.module_name}.parametrizations.{weight.parameter}.0".removeprefix(".")
        deployed.get_submodule(place).load_state_dict(truncated.state_dict())
    return deployed


def plot_gap(gap: Gap, path: Path) -> None:
    """Draw codes changed per layer and width, and below it weight error and accuracy per width.

    Args:
        gap: What was measured.
        path: A ``.png``, ``.svg`` or ``.pdf`` file; replaced whole or not at all.

    Raises:
        UsageError: The file name ends otherwise.
        HostError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    names = list(gap.widths[0].layers)
    figure = Figure(figsize=(11, max(3.6, 1.6 + 0.22 * len(names))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ticks = [str(width.bits) for width in gap.widths]
    rounding = gap.quantizer != "dorefa"
    share = [[100 * w.rounded_layers[name].changed_share for w in gap.widths] for name in names]
    image = left.imshow(share, aspect="auto", cmap="magma_r", vmin=0, vmax=max(1.0, *map(max, share)))
    figure.colorbar(image, ax=left, label="codes changed by shifting, %")
    left.set_xticks(range(len(ticks)), ticks)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set_xlabel("bits")
    left.set_title("if these weights were rounded" if rounding else "per layer", fontsize=10)

    right.plot(ticks, [100 * w.total.error for w in gap.widths], "o-", label=f"weight error, {gap.quantizer}")
    if rounding:
        errors = [100 * w.rounded_total.error for w in gap.widths]
        right.plot(ticks, errors, "o--", label="weight error if rounded")
    measured = [w.accuracy for w in gap.widths if w.accuracy is not None]
    for label, shares, style in (
        ("accuracy, quantised", [accuracy.quantized for accuracy in measured], "s-"),
        ("accuracy, truncated", [accuracy.truncated for accuracy in measured], "x--"),
    ):
        if shares and None not in shares:
            right.plot(ticks, [100 * value for value in shares if value is not None], style, label=label)
    right.set_xlabel("bits")
    right.set_ylabel("%")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    right.set_title("whole network", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())


def check_plot(path: Path) -> None:
    """Make sure that :func:`plot_gap` can write ``path``, before any slow work.

    Raises:
        UsageError: The file name ends otherwise.
        HostError: matplotlib is not installed, or there is no such folder.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise UsageError(f"{path}: a plot is a file that ends in {', '.join(PLOT_SUFFIXES)}")
    if not path.parent.is_dir():
        raise HostError(f"cannot write {path}: there is no folder {path.parent}")
    ensure_folder(path.parent)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise HostError("plots need matplotlib; install it with pip install 'tqexport[report]'") from error


def _truncated(weight: QuantizedWeight, bits: int, scheme: Scheme) -> StoredWeight:
    """One weight as its 8-bit codes and a shift, by whichever quantiser."""
    value = weight.original.detach()
    codes = direct_codes(normalize(value), STORED_BITS, scheme.quantizer).byte()
    with about(f"layer {weight.layer}:"):
        return StoredWeight(codes, STORED_BITS - bits, affine(value, truncate(codes, bits), bits, scheme))


def _weight_gaps(model: TruncModel, bits: int, scheme: Scheme) -> tuple[dict[str, WeightGap], WeightGap]:
    """The gap of each layer by name, and that of all layers together."""
    layers: dict[str, WeightGap] = {}
    differences, sizes = 0.0, 0.0
    for weight in quantized_weights(model.module).values():
        value = weight.original.detach()
        direct = direct_codes(normalize(value), bits, scheme.quantizer).byte()
        stored = _truncated(weight, bits, scheme)
        shifted = stored.codes >> stored.shift
        with about(f"layer {weight.layer}:"):
            coded = affine(value, direct, bits, scheme)
        quantized = direct.double() * coded.scale + coded.offset
        truncated = shifted.double() * stored.affine.scale + stored.affine.offset
        difference, size = float((truncated - quantized).square().sum()), float(quantized.square().sum())
        changed = int((shifted != direct).sum())
        layers[weight.layer] = WeightGap(direct.numel(), changed, (difference / size) ** 0.5)
        differences, sizes = differences + difference, sizes + size
    total = WeightGap(
        sum(gap.weights for gap in layers.values()),
        sum(gap.changed for gap in layers.values()),
        (differences / sizes) ** 0.5,
    )
    return layers, total


def _accuracy_gap(model: TruncModel, bits: int, inputs: Batch, labels: npt.NDArray[np.int64] | None) -> AccuracyGap:
    """Run the network both ways through the same operators, so that nothing but the codes can differ."""
    quantized = _classes(deploy(model, bits), inputs)
    truncated = _classes(deploy_truncated(model, bits), inputs)
    return AccuracyGap(
        samples=len(inputs[0]),
        agreement=float((quantized == truncated).mean()),
        quantized=None if labels is None else float((quantized == labels).mean()),
        truncated=None if labels is None else float((truncated == labels).mean()),
    )


def _classes(network: nn.Module, inputs: Batch) -> npt.NDArray[np.int64]:
    """Index of the largest number of the first output for each sample, (N,)."""
    tensors = [torch.from_numpy(values) for values in inputs]
    with torch.no_grad():
        parts = [
            next(iter(run_network(network, [values[i : i + _BATCH] for values in tensors]).values()))
            .flatten(1)
            .argmax(1)
            for i in range(0, len(inputs[0]), _BATCH)
        ]
    classes: npt.NDArray[np.int64] = torch.cat(parts).numpy()
    return classes
