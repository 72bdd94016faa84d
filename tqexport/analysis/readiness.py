"""What of a network is quantised and what stays in float, and why: known before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tqexport.integer.naming import NamedCalls
from tqexport.layer_kinds import LAYER_KINDS, kind_of
from tqexport.model import TruncModel
from tqexport.networks.candidate import Candidate
from tqexport.outputs import zeros_for
from tqexport.training.preparation import kind_that_prepare_takes
from tqexport.training.quantizers import ActivationQuantizer, quantized_weights
from tqexport.training.ranges import RangeQuantizer

__all__ = ["Part", "parts_of"]

_ACTIVATIONS = "torch.nn.modules.activation"


@dataclass(frozen=True)
class Part:
    """A weight or an activation of a network.

    Attributes:
        name: Of the layer, with the parameter where that is not ``weight``; of a function, where it is called.
        kind: The class in ``torch.nn``, or the function; ``input`` for what a layer rounds before it multiplies.
        shape: Of the weight; empty for an activation.
        quantized: Whether the weight becomes codes, or the activation levels.
        reason: Why it is not; empty where it is.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    quantized: bool
    reason: str = ""


def parts_of(candidate: Candidate) -> tuple[Part, ...]:
    """Every parameter with two axes or more, and every activation, in the order of definition; then ReLU functions."""
    module = candidate.model.module
    quantized = {(id(weight.module), weight.parameter) for weight in quantized_weights(module).values()}
    layers = [name for name, part in module.named_modules() if kind_that_prepare_takes(part) is not None]
    parts: list[Part] = []
    for name, part in module.named_modules():
        if "parametrizations" in name.split("."):
            continue
        kind = _class_name(part)
        for parameter, shape in _weights(part):
            is_quantized = (id(part), parameter) in quantized
            reason = "" if is_quantized else _reason(candidate, layers, name, part)
            full = name if parameter == "weight" else f"{name}.{parameter}".removeprefix(".")
            parts.append(Part(full, kind, shape, is_quantized, reason))
        if isinstance(part, ActivationQuantizer):
            of_input = isinstance(part, RangeQuantizer) and part.signed
            parts.append(Part(name, "input" if of_input else "ReLU", (), quantized=True))
        elif type(part).__module__ == _ACTIVATIONS and not isinstance(part, nn.MultiheadAttention):
            parts.append(Part(name, kind, (), quantized=False, reason=_activation_reason(candidate, part)))
    return (*parts, *_functions(candidate.model))


def _class_name(module: nn.Module) -> str:
    """The kind of a layer, or the class of a module."""
    kind, own = kind_of(module), parametrize.type_before_parametrizations(module)
    return kind.name if kind and own.__module__.startswith("tqexport.") else own.__name__


def _weights(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of a module itself that have two axes or more, by name."""
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name in module.parametrizations:
            with torch.no_grad():
                yield name, tuple(getattr(module, name).shape)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim > 1:
            yield name, tuple(parameter.shape)


def _reason(candidate: Candidate, layers: Sequence[str], name: str, module: nn.Module) -> str:
    """Why a weight stays in float."""
    own = parametrize.type_before_parametrizations(module)
    known = kind_of(module)
    if known is None:
        kinds = ", ".join(kind.name for kind in LAYER_KINDS)
        return f"{own.__name__} is none of the kinds that are quantised: {kinds}"
    if not candidate.prepared_here:
        return "the factory leaves it in float"
    if kind_that_prepare_takes(module) is None:
        return f"{own.__name__} is derived from {known.name}, and prepare takes {known.name} itself alone"
    if candidate.float_layers is not None:
        return "named in float_layers"
    return f"the {'first' if name == layers[0] else 'last'} layer, which prepare leaves in float"


def _activation_reason(candidate: Candidate, module: nn.Module) -> str:
    """Why an activation is not rounded to levels."""
    if isinstance(module, nn.ReLU):
        return "derived from ReLU" if candidate.prepared_here else "the factory leaves it in float"
    return "of the activations ReLU alone is quantised"


def _functions(model: TruncModel) -> list[Part]:
    """ReLUs that a ``forward`` calls as functions."""
    samples = zeros_for(model.info.signature, 2)
    with model.at_width(model.info.widths[-1]) as network:
        calls = _Relus(network)
        try:
            with torch.no_grad(), calls:
                network(*samples)
        except Exception:  # the network's own code raises whatever it raises; the formats say what
            return []
    reason = "a function, which prepare does not see: make it an nn.ReLU to have it quantised"
    return [Part(name, "relu", (), quantized=False, reason=reason) for name in calls.names]


class _Relus(NamedCalls):
    """The names of the ReLUs that are no modules."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.names: list[str] = []
        self._modules_by_name = dict(root.named_modules())

    def on_function(
        self,
        name: str,
        function: Callable[..., Any],
        args: Sequence[Any],  # noqa: ARG002
        kwargs: Mapping[str, Any],  # noqa: ARG002
        output: Any,
    ) -> Any:
        """Keep the name of a ReLU, unless a module made for it calls it."""
        inside = type(self._modules_by_name.get(name.rpartition("/")[0]))
        if getattr(function, "__name__", "") in ("relu", "relu_") and inside.__module__ != _ACTIVATIONS:
            self.names.append(name)
        return output
