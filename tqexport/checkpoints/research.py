"""Checkpoints of the research family (Any-Precision, TruncQuant and their siblings).

Such a file holds tensors and perhaps the architecture's name. How its weights were quantised is not in it, so that is
an option with the family's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tqexport.checkpoints.options import ReadOptions
from tqexport.checkpoints.recognition import batch_norm_widths, recognize
from tqexport.checkpoints.tensor_file import checked_state_dict
from tqexport.errors import InputError, UsageError, about
from tqexport.model import CheckpointInfo
from tqexport.truncation import FLOAT_BITS, WIDTHS, Scheme

__all__ = ["FAMILY_DEFAULTS", "read_research"]

FAMILY_DEFAULTS = {
    "quantizer": "truncquant",
    "bias_correction": "none",
    "act_bits": "as the weights",
    "bn_key": "weight",
}


def read_research(
    path: Path, content: Mapping[str, Any], options: ReadOptions
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """What a checkpoint of the family holds, as far as file and options tell.

    Args:
        path: The file, for messages.
        content: ``{'model': name, 'state_dict': ..., ...}``, or a bare state dict.
        options: What the file does not say.

    Returns:
        The description and the state dict, without the ``module.`` that DataParallel puts in front.

    Raises:
        InputError: There is no state dict in it, or it is of no known network.
        UsageError: An option does not fit the file.
    """
    state_dict = _state_dict(path, content)
    architecture, arguments, natural_shape = _architecture(path, content, state_dict, options)
    input_shape = options.input_shape or natural_shape
    if input_shape is None:
        raise UsageError(f"{path} does not say what its network takes; add --input-shape, e.g. 3,32,32")
    widths = _widths(state_dict)
    if not widths:
        raise InputError(f"{path} has a BatchNorm for {FLOAT_BITS} bits alone, so there is no width to export")
    info = CheckpointInfo(
        architecture=architecture,
        arguments=arguments,
        inputs=input_shape,
        widths=widths,
        scheme=Scheme(options.quantizer or "truncquant", bool(options.bias_correction)),
        activation_bits=_activation_bits(options.act_bits, widths),
        batch_norm_key=options.bn_key or "weight",
    )
    return info, state_dict


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, without the ``module.`` that DataParallel puts in front."""
    candidate = content.get("state_dict", content)
    if candidate is content and not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(
            f"{path} is a PyTorch file but no checkpoint: it has neither a state_dict entry nor tensors "
            f"(its entries are {', '.join(map(str, list(content)[:5]))})"
        )
    state_dict = checked_state_dict(path, candidate)
    if all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return state_dict


def _architecture(
    path: Path, content: Mapping[str, Any], state_dict: Mapping[str, Tensor], options: ReadOptions
) -> tuple[str, dict[str, Any], tuple[int, ...] | None]:
    """Name of the network, its factory's arguments and, where known, the shape of one sample."""
    if options.model:
        return options.model, {}, None
    named = content.get("model", content.get("arch"))
    with about(f"{path}:"):
        if options.arch or not isinstance(named, str):
            return recognize(state_dict, options.arch)
        try:
            return recognize(state_dict, named)
        except UsageError:  # a name of the user's own for one of the known networks
            return recognize(state_dict)


def _widths(state_dict: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The widths that have a BatchNorm; all where BatchNorm does not depend on the width."""
    present = batch_norm_widths(state_dict)
    return tuple(bits for bits in present if bits in WIDTHS) if present else WIDTHS


def _activation_bits(asked: tuple[int, ...] | None, widths: tuple[int, ...]) -> tuple[int, ...]:
    """The activation width of each width; empty where it is the width of the weights."""
    if asked is None:
        return ()
    if len(asked) not in (1, len(widths)):
        listed = ", ".join(map(str, widths))
        raise UsageError(f"--act-bits has {len(asked)} widths; give one, or one for each of the widths {listed}")
    return asked if len(asked) == len(widths) else asked * len(widths)
