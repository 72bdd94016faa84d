"""A network with everything an export must know about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqexport.checkpoints.options import BatchNormKey
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.truncation import Scheme

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DTYPES", "CheckpointInfo", "InputInfo", "Normalization", "TruncModel", "dynamic_sizes"]

DTYPES = ("float32", "int32", "int64", "uint8", "bool")  # of inputs: those that PyTorch, ONNX and TFLite share
ONLY_INPUT = "input"  # what the input of a network with one is called where nobody says otherwise
_TAKEN = ("bits", "labels")  # names with a meaning of their own, in run-time files and in files of samples
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Normalization:
    """``(x - mean) / std`` per channel, in the units of the raw input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class InputInfo:
    """One input of a network.

    Attributes:
        name: What it is called in the files: letters, digits and underscores.
        shape: Of one sample, channels first, without the batch; () for one number a sample.
        dtype: One of :data:`DTYPES`.
        below: Whole numbers that are tried at random are 0 to ``below - 1``, e.g. the size of a vocabulary. int32 and
            int64 need it, uint8 has 256 by itself.
        dynamic: Axes of ``shape``, counted from 0, that may have any size in an ONNX file, each with a name for its
            size; axes of one name have one size. Given as ``{0: "length"}``, kept as pairs. Other formats have the
            size of ``shape``.

    Raises:
        UsageError: One of them is not as it must be.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    below: int | None = None
    dynamic: Mapping[int, str] | tuple[tuple[int, str], ...] = ()

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """The names of the sizes that are free, by axis of ``shape``."""
        return dict(self.dynamic)

    def resized(self, sizes: Mapping[str, int]) -> InputInfo:
        """The same input with other sizes along its dynamic axes, by their names."""
        named = self.dynamic_axes
        shape = (sizes.get(named.get(axis, ""), size) for axis, size in enumerate(self.shape))
        return InputInfo(self.name, tuple(shape), self.dtype, self.below)

    @property
    def limit(self) -> int:
        """What whole numbers and truth values are below; 0 for floats, which have no such limit."""
        return self.below or {"uint8": 256, "bool": 2}.get(self.dtype, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not _NAME.fullmatch(self.name) or self.name in _TAKEN:
            raise UsageError(
                f"{self.name!r} cannot be the name of an input: use letters, digits and underscores, and not "
                f"{' or '.join(_TAKEN)}"
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"input {self.name} is {self.dtype}; inputs are {', '.join(DTYPES)}")
        if not all(isinstance(size, int) and size > 0 for size in self.shape):
            raise UsageError(f"input {self.name} has the shape {self.shape}; sizes are whole numbers from 1")
        if self.dtype in ("int32", "int64") and self.below is None:
            raise UsageError(f"input {self.name} is {self.dtype}; say with below=N that its numbers are 0 to N - 1")
        if self.below is not None and (self.dtype not in ("int32", "int64", "uint8") or self.below < 1):
            raise UsageError(f"input {self.name} is {self.dtype} below {self.below}; whole numbers are below 1 or more")
        axes = self.dynamic_axes
        object.__setattr__(self, "dynamic", tuple(sorted(axes.items())))
        for axis, size_name in axes.items():
            if axis not in range(len(self.shape)) or self.shape[axis] < 2:
                raise UsageError(
                    f"input {self.name} has no axis {axis} of a size from 2 in {self.shape}; axes are counted from 0, "
                    "without the batch"
                )
            if not _NAME.fullmatch(size_name) or size_name == "batch":
                raise UsageError(
                    f"{size_name!r} cannot be the name of a size: use letters, digits and underscores, and not batch"
                )


def dynamic_sizes(signature: Sequence[InputInfo]) -> dict[str, int]:
    """The sizes that are free in ONNX files, by name, as ``shape`` has them.

    Raises:
        UsageError: Axes of one name have different sizes.
    """
    sizes: dict[str, int] = {}
    for info in signature:
        for axis, name in info.dynamic_axes.items():
            if sizes.setdefault(name, info.shape[axis]) != info.shape[axis]:
                raise UsageError(f"{name} is {sizes[name]} and {info.shape[axis]}; axes of one name have one size")
    return sizes


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself besides its tensors.

    Attributes:
        architecture: Registered name, or ``package.module:factory``.
        arguments: Keyword arguments of the factory; plain values only.
        inputs: What ``forward`` takes, in its order: an :class:`InputInfo` for each. A shape alone, (3, 32, 32), stands
            for one float32 input called ``input``. Always a tuple of :class:`InputInfo` in :attr:`signature`.
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
    inputs: tuple[int, ...] | tuple[InputInfo, ...]
    widths: tuple[int, ...]
    scheme: Scheme = field(default_factory=Scheme)
    activation_bits: tuple[int, ...] = ()
    batch_norm_key: BatchNormKey = "weight"
    normalization: Normalization | None = None
    class_names: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", self.signature)
        dynamic_sizes(self.signature)
        names = [each.name for each in self.signature]
        if not names or len({*names}) < len(names):
            raise UsageError(
                f"the inputs are {', '.join(names) or 'none'}; a network has one or more, by different names"
            )

    @property
    def signature(self) -> tuple[InputInfo, ...]:
        """The inputs of ``forward``, in its order."""
        infos = tuple(each for each in self.inputs if isinstance(each, InputInfo))
        return infos or (InputInfo(ONLY_INPUT, tuple(each for each in self.inputs if isinstance(each, int))),)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the only input of a network of integers.

        Raises:
            ConversionError: There are several inputs, or it is not float32.
        """
        first, *others = self.signature
        if others or first.dtype != "float32":
            kinds = ", ".join(f"{each.name} ({each.dtype})" for each in self.signature)
            raise ConversionError(f"a network of integers takes one float32 input, and this one takes {kinds}")
        return first.shape

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
        module: The PyTorch reference; takes a tensor (N, *shape) for each input of ``info``.
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
