"""Calling a network: samples to try it on, and what it returns as tensors by name, the same in files and reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from tqexport.errors import ConversionError
from tqexport.model import InputInfo

__all__ = ["ONLY_OUTPUT", "outputs_of", "run_network", "zeros_for"]

ONLY_OUTPUT = "output"  # what the tensor of a network that returns one is called


def zeros_for(signature: Sequence[InputInfo], samples: int) -> list[Tensor]:
    """Samples of zeros, a tensor (samples, *shape) for each input, which every network takes that takes any."""
    return [torch.zeros((samples, *each.shape), dtype=getattr(torch, each.dtype)) for each in signature]


def run_network(network: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run a network on a tensor (N, ...) for each of its inputs, see :func:`outputs_of`."""
    return outputs_of(network(*inputs))


def outputs_of(returned: Any) -> dict[str, Tensor]:
    """The tensors of what a network returned, in the order that ``torch.export`` gives them.

    A tensor alone is called ``output``. In a dict a tensor is called by its key, in a tuple or list ``output_0``,
    ``output_1`` and so on, in what is nested by both: ``boxes_0``.

    Raises:
        ConversionError: There is none, something else is among them, or two have the same name.

    Example:
        >>> import torch
        >>> list(outputs_of({"boxes": torch.ones(1, 4), "scores": (torch.ones(1, 2), torch.ones(1, 2))}))
        ['boxes', 'scores_0', 'scores_1']
    """
    if isinstance(returned, Tensor):
        return {ONLY_OUTPUT: returned}
    outputs: dict[str, Tensor] = {}
    for path, value in tree_flatten_with_path(returned)[0]:
        name = _name([getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path])
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"the network returns a {type(value).__name__} ({name}) besides tensors; wrap it in a module that "
                "returns tensors alone"
            )
        if name in outputs:
            raise ConversionError(f"the network returns two tensors that would be called {name}; rename one")
        outputs[name] = value
    if not outputs:
        raise ConversionError("the network returns no tensor; wrap it in a module that returns one")
    return outputs


def _name(keys: Sequence[object]) -> str:
    """A name of letters, digits and underscores."""
    text = "_".join(re.sub(r"\W", "_", str(key), flags=re.ASCII) for key in keys)
    return text if text[:1].isalpha() else f"{ONLY_OUTPUT}_{text}"
