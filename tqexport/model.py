"""A network with everything an export must know about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqexport.checkpoints.options import BatchNormKey
from tqexport.errors import InputError
from tqexport.truncation import Scheme

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CheckpointInfo", "Normalization", "TruncModel"]


@dataclass(frozen=True)
class Normalization:
    """``(x - mean) / std`` per channel, in the units of the raw input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself besides its tensors.

    Attributes:
        architecture: Registered name, or ``package.module:factory``.
        arguments: Keyword arguments of the factory; plain values only.
        input_shape: Shape of one sample, channels first, without the batch, e.g. (3, 32, 32).
        widths: Bit widths that can be exported, ascending.
        scheme: The weight quantiser.
        activation_bits: Activation width of each of ``widths``; empty means the width of the weights.
        batch_norm_key: Whether the BatchNorm of the weight width or of the activation width is live.
        normalization: How raw input becomes network input, if known.
        class_names: Names of the outputs, if known.
        grids: Values that have an 8-bit grid of their own, see :mod:`tqexport.integer`; empty before calibration.
    """

    architecture: str
    arguments: Mapping[str, Any]
    input_shape: tuple[int, ...]
    widths: tuple[int, ...]
    scheme: Scheme = field(default_factory=Scheme)
    activation_bits: tuple[int, ...] = ()
    batch_norm_key: BatchNormKey = "weight"
    normalization: Normalization | None = None
    class_names: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()

    def activation_width(self, bits: int) -> int:
        """The activation width that goes with weight width ``bits``."""
        return self.activation_bits[self.widths.index(bits)] if self.activation_bits else bits

    def batch_norm_width(self, bits: int) -> int:
        """The width whose BatchNorm is live at weight width ``bits``."""
        return bits if self.batch_norm_key == "weight" else self.activation_width(bits)


@dataclass(frozen=True)
class TruncModel:
    """A loaded network, in evaluation mode, with its description.

    Attributes:
        module: The PyTorch reference; input (N, *input_shape) float32.
        info: What the checkpoint says of itself.
        sha256: Hash of the checkpoint file, hex; empty for a network that was never saved.
        assumed: What the file does not say and nobody said either, so that the family's default was taken.
    """

    module: nn.Module
    info: CheckpointInfo
    sha256: str = ""
    assumed: tuple[str, ...] = ()

    def check_width(self, bits: int) -> None:
        """Refuse a width this network does not have.

        Raises:
            InputError: ``bits`` is not among ``info.widths``.
        """
        if bits not in self.info.widths:
            have = ", ".join(map(str, self.info.widths))
            raise InputError(
                f"this checkpoint has no {bits}-bit BatchNorm, so {bits} bits cannot be exported; it has {have}"
            )

    @contextmanager
    def at_width(self, bits: int) -> Iterator[nn.Module]:
        """The reference network set to ``bits`` bits, with the activation width that belongs to it."""
        from tqexport.training.widths import at_width

        self.check_width(bits)
        widths = (bits, self.info.activation_width(bits), self.info.batch_norm_width(bits))
        with at_width(self.module, *widths) as module:
            yield module
