"""Which network of the research family a state dict belongs to.

Nothing in such a checkpoint says which layers are quantised or which variant of a network it holds. Both follow from
the architecture, and that is read off the tensors' keys and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tqexport.errors import InputError, UsageError

__all__ = ["batch_norm_widths", "recognize"]


@dataclass(frozen=True)
class _Description:
    """What the tensors of an architecture look like.

    Attributes:
        prefixes: Some key begins with each of these, and no other architecture of the family has all of them.
        input_shape: One sample, channels first.
        size: The factory's argument for the number of channels, the weight it is read from, and its unit.
    """

    prefixes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    size: tuple[str, str, int]

    def missing(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """The prefixes that no key has."""
        return [prefix for prefix in self.prefixes if not _has(state_dict, prefix)]


_DESCRIPTIONS = {
    "preresnet18q": _Description(
        ("model.fc.weight", "model.layer1.0.bn1_2.", "model.layer4.1.pre_bn."),
        (3, 224, 224),
        ("planes", "model.conv1.weight", 1),
    ),
    "resnet20q": _Description(
        ("fc.weight", "layers.0.bn0.", "layers.3.skip_conv.", "layers.8.conv1."),
        (3, 32, 32),
        ("expansion", "conv0.weight", 16),
    ),
    "resnet50q": _Description(
        ("fc.weight", "layer1.0.bn0.", "layer1.0.downsample.1.", "layer4.2.conv2."),
        (3, 224, 224),
        ("planes", "conv1.weight", 1),
    ),
    "svhnq": _Description(
        ("fc.weight", "layers.0.bias", "layers.3.weight", "layers.20.weight"),
        (3, 40, 40),
        ("expansion", "layers.0.weight", 6),
    ),
}


def recognize(
    state_dict: Mapping[str, Tensor], name: str | None = None
) -> tuple[str, dict[str, Any], tuple[int, int, int]]:
    """Find out which network of the family a state dict belongs to.

    Only what tells the networks apart is looked at; whether every tensor fits is for loading to say.

    Args:
        state_dict: Tensors by key, without the ``module.`` of DataParallel.
        name: The architecture, where the file or the user names one.

    Returns:
        The architecture, its factory's arguments (plain values), and the shape of one sample it was made for.

    Raises:
        UsageError: ``name`` is not an architecture of the family.
        InputError: The tensors are those of another network, or of none that is known.

    Example:
        >>> from tqexport.networks.research_models import svhnq
        >>> recognize(svhnq(expansion=2, widths=[2, 8]).state_dict())
        ('svhnq', {'expansion': 2, 'num_classes': 10, 'widths': [2, 8]}, (3, 40, 40))
    """
    known = ", ".join(_DESCRIPTIONS)
    otherwise = "bring your own network with --model package.module:factory"
    if name and name not in _DESCRIPTIONS:
        raise UsageError(f"{name!r} is not one of the known architectures {known}; name one of them or {otherwise}")
    if not name:
        name = next((known for known, those in _DESCRIPTIONS.items() if not those.missing(state_dict)), None)
    if not name:
        raise InputError(f"these tensors belong to none of the known architectures {known}; {otherwise}")
    description = _DESCRIPTIONS[name]
    if missing := description.missing(state_dict):
        raise InputError(f"these tensors are not those of {name}, which has {missing[0]}*; {otherwise}")
    try:
        return name, _arguments(name, description, state_dict), description.input_shape
    except InputError as error:
        raise InputError(f"these tensors are not those of {name}: {error}; {otherwise}") from error


def batch_norm_widths(state_dict: Mapping[str, Tensor]) -> list[int]:
    """The widths that have a BatchNorm of their own, ascending."""
    return sorted({int(match[1]) for key in state_dict if (match := re.search(r"\.bn_dict\.([0-9]{1,2})\.", key))})


def _arguments(name: str, description: _Description, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments with which the factory builds the network of a state dict."""
    size, key, unit = description.size
    widths = batch_norm_widths(state_dict)
    arguments: dict[str, Any] = {
        size: _rows(state_dict, key, unit),
        "num_classes": _rows(state_dict, description.prefixes[0]),
        "widths": widths,
    }
    if name == "resnet20q":
        arguments["variant"] = _variant(state_dict)
    if name == "resnet50q":
        shortcuts = _has(state_dict, "layer1.0.downsample.1.bn_dict.")
        arguments["plain_downsample_norm"] = bool(widths) and not shortcuts
    return arguments


def _variant(state_dict: Mapping[str, Tensor]) -> str:
    """Which variant of resnet20q a state dict holds."""
    blocks, shortcuts = (_has(state_dict, f"layers.{part}.bn_dict.") for part in ("0.bn0", "3.skip_bn"))
    if shortcuts and not blocks:
        raise InputError("layers.3.skip_bn has a BatchNorm per width and layers.0.bn0 has not")
    if shortcuts:
        return "switchable"
    return "any-precision" if blocks else "shared-bn"


def _has(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state_dict)


def _rows(state_dict: Mapping[str, Tensor], key: str, unit: int = 1) -> int:
    """Output channels of a layer in units of ``unit``."""
    weight = state_dict.get(key)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise InputError(f"there is no weight {key}")
    rows = int(weight.shape[0])
    if rows == 0 or rows % unit:
        raise InputError(f"{key} has {rows} output channels, not a multiple of {unit}")
    return rows // unit
