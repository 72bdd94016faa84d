"""Checkpoint files, and the network with everything an export must know about it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqexport.errors import InputError, TqExportError
from tqexport.files import atomic_path, sha256_of
from tqexport.layers import at_width, quantized_layers, switchable_batch_norms
from tqexport.models import find_factory
from tqexport.truncation import FLOAT_BITS, WIDTHS, Scheme, check_weight

__all__ = ["CheckpointInfo", "Normalization", "ReadOptions", "TruncModel", "load_checkpoint", "save_checkpoint"]

FORMAT = "tqexport"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Normalization:
    """``(x - mean) / std`` per channel, in the units of the raw input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ReadOptions:
    """What a reader of a checkpoint says because the file does not.

    Attributes:
        model: ``package.module:factory`` to use in place of the architecture that the file names.
    """

    model: str | None = None


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
        normalization: How raw input becomes network input, if known.
        class_names: Names of the outputs, if known.
    """

    architecture: str
    arguments: Mapping[str, Any]
    input_shape: tuple[int, ...]
    widths: tuple[int, ...]
    scheme: Scheme = field(default_factory=Scheme)
    activation_bits: tuple[int, ...] = ()
    normalization: Normalization | None = None
    class_names: tuple[str, ...] = ()

    def activation_width(self, bits: int) -> int:
        """The activation width that goes with weight width ``bits``."""
        return self.activation_bits[self.widths.index(bits)] if self.activation_bits else bits


@dataclass(frozen=True)
class TruncModel:
    """A loaded network, in evaluation mode, with its description.

    Attributes:
        module: The PyTorch reference; input (N, *input_shape) float32.
        info: What the checkpoint says of itself.
        sha256: Hash of the checkpoint file, hex; empty for a network that was never saved.
    """

    module: nn.Module
    info: CheckpointInfo
    sha256: str = field(default="")

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
        self.check_width(bits)
        with at_width(self.module, bits, self.info.activation_width(bits)) as module:
            yield module


def save_checkpoint(path: str | Path, module: nn.Module, info: CheckpointInfo) -> None:
    """Write a native checkpoint, which says for itself what it is and loads with ``weights_only=True``.

    Args:
        path: The file to write; replaced as a whole or not at all.
        module: The network, as ``info.architecture(**info.arguments)`` builds it.
        info: Its description.
    """
    described = {**asdict(info), "arguments": dict(info.arguments)}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **described, "state_dict": module.state_dict()}
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as stream:
        torch.save(content, stream)


def load_checkpoint(path: str | Path, options: ReadOptions = ReadOptions()) -> TruncModel:
    """Read a checkpoint into a network ready to run and to export.

    Args:
        path: A file written by :func:`save_checkpoint`.
        options: What the file does not say.

    Raises:
        InputError: The file is missing, empty, truncated, unsafe, of another format, or does not fit its network.
        UsageError: The architecture is unknown.
    """
    path = Path(path)
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path} is a PyTorch file but not a tqexport checkpoint; write one with tqexport.save_checkpoint"
        )
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has checkpoint format {content.get('format_version')!r}, this tqexport reads {FORMAT_VERSION}; "
            "update tqexport"
        )
    try:
        info = _read_info(content, options)
        state_dict = dict(content["state_dict"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is a damaged tqexport checkpoint: {type(error).__name__} {error}") from error
    module = _build(path, info)
    _load_state(path, module, state_dict)
    _check(path, module, info)
    return TruncModel(module.eval(), info, sha256_of(path))


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a ``.pt`` file without ever unpickling code.

    Raises:
        InputError: The file is missing, empty, truncated, would run code, or does not hold a dictionary.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; name a checkpoint file" if not path.exists() else f"{path} is no file"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; copy it again from where it was trained")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler raises whatever they lead it to
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise InputError(
                f"{path} holds more than tensors and plain values, and loading it could run code; "
                "save its state dict alone and try again"
            ) from error
        raise InputError(f"{path} is not a PyTorch checkpoint, or it is truncated; copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _read_info(content: Mapping[str, Any], options: ReadOptions) -> CheckpointInfo:
    widths = _integers(content["widths"])
    activation_bits = _integers(content["activation_bits"])
    if not widths or not set(widths) <= set(WIDTHS) or len(activation_bits) not in (0, len(widths)):
        raise ValueError(f"widths {widths} with activation widths {activation_bits}")
    if not set(activation_bits) <= {*WIDTHS, FLOAT_BITS}:
        raise ValueError(f"activation widths {activation_bits}")
    normalization = content["normalization"]
    return CheckpointInfo(
        architecture=options.model or str(content["architecture"]),
        arguments=dict(content["arguments"]),
        input_shape=_integers(content["input_shape"]),
        widths=widths,
        scheme=Scheme(**content["scheme"]),
        activation_bits=activation_bits,
        normalization=normalization and Normalization(tuple(normalization["mean"]), tuple(normalization["std"])),
        class_names=tuple(map(str, content["class_names"])),
    )


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _build(path: Path, info: CheckpointInfo) -> nn.Module:
    factory = find_factory(info.architecture)
    try:
        module = factory(**info.arguments)
    except TqExportError:
        raise
    except Exception as error:  # a factory may be the user's own code: whatever it raises is about this file
        raise InputError(f"{path}: building {info.architecture} failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{path}: {info.architecture} returned a {type(module).__name__}, not an nn.Module")
    return module


def _load_state(path: Path, module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load every key or none."""
    wanted = module.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in wanted]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)}, not {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{path} does not fit its architecture: {shown}")
    module.load_state_dict(state_dict)


def _check(path: Path, module: nn.Module, info: CheckpointInfo) -> None:
    layers = quantized_layers(module)
    if not layers:
        raise InputError(f"{path}: {info.architecture} has no quantised layer; pass it through tqexport.prepare")
    for name, layer in layers.items():
        try:
            check_weight(name, layer.weight)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"{path}: {key} holds NaN or infinite values; the training diverged")
    for name, norm in switchable_batch_norms(module).items():
        if missing := sorted(set(info.widths) - set(norm.widths)):
            raise InputError(f"{path} claims widths {list(info.widths)}, but {name} has no BatchNorm for {missing}")
