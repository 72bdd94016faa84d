"""Networks that were captured before: torch.export takes seconds, and a graph depends on the structure alone.

A graph has no value of a network in it; a width puts in its own. So networks of the same modules, with equal settings
and shapes, have the same graph. What has a setting that is more than numbers, texts and the like is captured anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tqexport import InputInfo

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Captures"]

_TENSORS = ("_parameters", "_buffers", "_modules")  # which are looked at by themselves


class Captures:
    """Takes the place of :func:`tqexport.backends.onnx.export.capture`."""

    def __init__(self, capture: Callable[[nn.Module, Sequence[InputInfo]], ir.Model]) -> None:
        self._capture = capture
        self._kept: dict[str, ir.Model] = {}

    def __call__(self, deployed: nn.Module, inputs: Sequence[InputInfo]) -> ir.Model:
        """Capture a network, or give the graph of one of the same structure."""
        try:
            structure = f"{inputs!r}\n{_structure(deployed)}"
        except _UnknownError:
            return self._capture(deployed, inputs)
        if structure not in self._kept:
            self._kept[structure] = self._capture(deployed, inputs)
        return self._kept[structure].clone()


class _UnknownError(Exception):
    """Something whose effect on a graph cannot be said."""


def _structure(network: nn.Module) -> str:
    """All that a graph of a network depends on, line by line."""
    lines = []
    first: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        lines.append(f"{name}: {_class(module)}, as {first.setdefault(id(module), name)}")
        for key, value in sorted(vars(module).items()):
            if "_hook" not in key:
                lines += [] if key in _TENSORS else [f"  {key} = {_setting(value)}"]
            elif value and "state_dict" not in key:  # whose hooks have no part in what a network computes
                raise _UnknownError
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                same = None if tensor is None else first.setdefault(id(tensor), f"{name}.{key}")
                shape = None if tensor is None else (tensor.shape, tensor.dtype, tensor.stride(), tensor.requires_grad)
                lines.append(f"  {kind} {key}: {shape}, as {same}")
    return "\n".join(lines)


def _class(module: nn.Module) -> str:
    """The name of a module's class, under which there is nothing else."""
    kind = type(module).__mro__[1] if is_parametrized(module) else type(module)
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not kind:
        raise _UnknownError
    return f"{kind.__module__}.{kind.__qualname__}"


def _setting(value: object) -> str:
    """A setting in a text that equal ones share, and no others."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_setting(key)}: {_setting(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_setting, value))})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_setting, value)))}}}"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    raise _UnknownError
