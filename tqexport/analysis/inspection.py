"""What a checkpoint holds, what it costs to store, and whether its codes can be truncated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tqexport.layer_kinds import kind_of
from tqexport.model import TruncModel
from tqexport.training.quantizers import QuantizedWeight, quantized_weights
from tqexport.training.ranges import ranges_of
from tqexport.truncation import STORED_BITS, Scheme, direct_codes, magnitude, normalize, truncate

__all__ = ["Inspection", "LayerReport", "RangeReport", "StorageReport", "inspect_model"]


@dataclass(frozen=True)
class LayerReport:
    """One weight of a layer.

    Attributes:
        name: Name of the layer, with the parameter where that is not ``weight``.
        kind: Class of the layer in ``torch.nn``, e.g. ``Conv2d``.
        shape: Shape of its weight.
        quantized: Whether it is stored as codes.
        magnitude: ``E = mean|w|``, rounded to a power of two where the quantised layers are.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    quantized: bool
    magnitude: float

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RangeReport:
    """An activation quantiser whose range was learned.

    Attributes:
        name: Its name.
        signed: Whether it goes from ``-range`` to ``range``, or from 0 to ``range``.
        range: What was learned.
    """

    name: str
    signed: bool
    range: float


@dataclass(frozen=True)
class StorageReport:
    """Bytes of the parameters, at one width where not said otherwise.

    Attributes:
        float32: Everything in float32.
        codes: One byte per quantised weight, everything else in float32.
        packed: By width: that many bits per quantised weight, everything else in float32.
        every_width: One byte per quantised weight, and the float parameters of every width.
    """

    float32: int
    codes: int
    packed: Mapping[int, int]
    every_width: int


@dataclass(frozen=True)
class Inspection:
    """What a network is like.

    Attributes:
        layers: The weights of every layer of a kind that can be quantised, in definition order.
        ranges: The activation quantisers whose range was learned, in definition order.
        storage: What it costs to store.
        changed: By width: the share of codes that differ between quantising the float weights directly to that width
            and shifting the 8-bit codes, over all layers. 0 means that the codes can be truncated.
    """

    layers: tuple[LayerReport, ...]
    ranges: tuple[RangeReport, ...]
    storage: StorageReport
    changed: Mapping[int, float]

    @property
    def truncatable(self) -> bool:
        """Whether shifting gives the codes that training used, at every width."""
        return not any(self.changed.values())


def inspect_model(model: TruncModel) -> Inspection:
    """Describe the layers of a network, its size, and whether its codes can be shifted.

    Args:
        model: A loaded checkpoint.
    """
    quantized = quantized_weights(model.module)
    layers = tuple(
        _report(name, kind.name, parameter, module, quantized)
        for name, module in model.module.named_modules()
        if (kind := kind_of(module))
        for parameter in kind.parameters_of(module)
    )
    ranges = tuple(
        RangeReport(name, quantizer.signed, float(quantizer.range.detach().abs()))
        for name, quantizer in ranges_of(model.module).items()
    )
    return Inspection(layers, ranges, _storage(model, layers), _changed_codes(model))


def _report(
    module_name: str, kind: str, parameter: str, module: nn.Module, quantized: Mapping[str, QuantizedWeight]
) -> LayerReport:
    """Describe one weight, quantised or float."""
    weight = quantized.get(f"{module_name}.{parameter}".removeprefix("."))
    value = weight.original if weight else getattr(module, parameter)
    name = module_name if parameter == "weight" else f"{module_name}.{parameter}"
    size = float(magnitude(value, weight.scheme if weight else Scheme()))
    return LayerReport(name, kind, tuple(value.shape), weight is not None, size)


def _storage(model: TruncModel, layers: tuple[LayerReport, ...]) -> StorageReport:
    """Count bytes; BatchNorms of a width other than the live one count for the file of every width alone."""
    codes = sum(layer.weights for layer in layers if layer.quantized)
    per_width: dict[int, int] = dict.fromkeys(model.info.widths, 0)
    shared = 0
    for key, value in model.module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        _, dictionary, after = key.partition(".bn_dict.")
        if not dictionary:
            shared += value.numel()
            continue
        norm = int(after.partition(".")[0])
        for bits in per_width:
            per_width[bits] += value.numel() * (model.info.batch_norm_width(bits) == norm)
    widest = max(per_width)
    other = 4 * (shared - codes + per_width[widest])
    return StorageReport(
        float32=4 * codes + other,
        codes=codes + other,
        packed={bits: (codes * bits + 7) // 8 + other for bits in per_width},
        every_width=codes + other + 4 * sum(n for bits, n in per_width.items() if bits != widest),
    )


def _changed_codes(model: TruncModel) -> dict[int, float]:
    """By width, the share of codes that shifting the 8-bit codes changes."""
    changed = dict.fromkeys(model.info.widths, 0)
    total = 0
    quantizer = model.info.scheme.quantizer
    for weight in quantized_weights(model.module).values():
        x = normalize(weight.original.detach())
        stored = direct_codes(x, STORED_BITS, quantizer).byte()
        total += x.numel()
        for bits in changed:
            changed[bits] += int((truncate(stored, bits) != direct_codes(x, bits, quantizer)).sum())
    return {bits: count / total for bits, count in changed.items()}
