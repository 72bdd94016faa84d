"""The quantisers that stand in a network while it trains, with their straight-through gradients.

A weight is quantised where its module reads it: :class:`WeightQuantizer` is a parametrization
(``torch.nn.utils.parametrize``), so the module's own forward stays as it is, and ``module.weight`` is the quantised
weight at the current width. The float weight that trains is the parametrization's ``original``; in a state dict it
keeps the plain key, ``layers.0.conv0.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tqexport.errors import UsageError
from tqexport.training.recurrent import read_weights_in_calls
from tqexport.training.widths import FollowsWidth
from tqexport.truncation import (
    FLOAT_BITS,
    Quantizer,
    Scheme,
    affine,
    direct_codes,
    full_precision,
    magnitude,
    max_code,
    normalize,
    quantize_activation,
)

__all__ = [
    "ActivationQuantizer",
    "Clamp",
    "Estimator",
    "QuantizedWeight",
    "WeightQuantizer",
    "is_quantized",
    "plain_name",
    "quantize_parameter",
    "quantize_weight",
    "quantized_weights",
    "set_quantizer",
    "unwrapped",
]

Estimator = Literal["identity", "scaled"]

_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)(?:\.(?:original|0))?(?=\.|$)")


class _QuantizeCodes(torch.autograd.Function):
    """x in [0, 1] -> codes / M_b, with the gradient passed straight through times ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, quantizer: Quantizer, factor: float) -> Tensor:
        ctx.factor = factor
        return direct_codes(x, bits, quantizer) / max_code(bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.factor, None, None, None


class _QuantizeActivation(torch.autograd.Function):
    """Activation quantiser whose gradient is that of the clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        return quantize_activation(x, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ((x >= 0) & (x <= 1)), None


def quantize_weight(weight: Tensor, bits: int, scheme: Scheme = Scheme(), estimator: Estimator = "identity") -> Tensor:
    """The weight a layer multiplies with at ``bits`` bits, differentiable.

    Args:
        weight: float32, any shape: one whole layer.
        bits: 1 to 8, or 32 for the full-precision path.
        scheme: The quantiser and its options.
        estimator: Gradient of the quantiser: ``identity``, or ``scaled`` by ``M_b / (M_b + 1)`` (arXiv 2506.11431).

    Returns:
        float32, the shape of ``weight``.
    """
    if bits == FLOAT_BITS:
        return full_precision(weight, scheme)
    factor = max_code(bits) / (max_code(bits) + 1) if estimator == "scaled" else 1.0
    unit: Tensor = _QuantizeCodes.apply(normalize(weight), bits, scheme.quantizer, factor)  # type: ignore[no-untyped-call]
    if scheme.bias_correction:
        coded = affine(weight.detach(), unit.detach() * max_code(bits), bits, scheme)
        return unit * (coded.scale * max_code(bits)) + coded.offset
    return magnitude(weight, scheme) * (2 * unit - 1)


class WeightQuantizer(FollowsWidth):
    """The parametrization of a quantised parameter: float32 weight in, float32 weight at the current width out."""

    follows = "weights"

    def __init__(self, scheme: Scheme = Scheme(), estimator: Estimator = "identity") -> None:
        super().__init__()
        self.scheme = scheme
        self.estimator: Estimator = estimator

    def forward(self, weight: Tensor) -> Tensor:
        return quantize_weight(weight, self.bits, self.scheme, self.estimator)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What ``module.weight = value`` makes the float32 original: the value itself."""
        return weight


class ActivationQuantizer(FollowsWidth):
    """``round(clamp(x, 0, 1) * M_a) / M_a`` at the current activation width; ReLU at 32 bits."""

    follows = "activations"

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _QuantizeActivation.apply(input, self.bits)  # type: ignore[no-untyped-call]
        return result

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lowest and the highest number that it rounds to, and how many levels are 1 apart; float32 scalars."""
        return torch.tensor(0.0), torch.tensor(1.0), torch.tensor(float(max_code(self.bits)))


class Clamp(FollowsWidth):
    """``clamp(x, 0, 1)``, not rounded, at quantised activation widths; ReLU at 32 bits. float32, same shape."""

    follows = "activations"

    def forward(self, input: Tensor) -> Tensor:
        return input.relu() if self.bits == FLOAT_BITS else input.clamp(0, 1)


@dataclass(frozen=True)
class QuantizedWeight:
    """A parameter of a network that is quantised.

    Attributes:
        module_name: Name of the module that it belongs to, e.g. ``layers.0.conv0``.
        parameter: Its name there, e.g. ``weight``.
        module: The module.
        quantizer: Its quantiser.
    """

    module_name: str
    parameter: str
    module: nn.Module
    quantizer: WeightQuantizer

    @property
    def name(self) -> str:
        """Name of the parameter in the network, e.g. ``layers.0.conv0.weight``, as state dicts and files have it."""
        return f"{self.module_name}.{self.parameter}".removeprefix(".")

    @property
    def layer(self) -> str:
        """What people are told: the module's name, with the parameter where that is not ``weight``."""
        return self.module_name if self.parameter == "weight" else self.name

    @property
    def original(self) -> nn.Parameter:
        """The float32 parameter that is trained, from which the quantised weight is computed."""
        original = _parametrizations(self.module, self.parameter).original
        assert isinstance(original, nn.Parameter)
        return original

    @property
    def scheme(self) -> Scheme:
        """How it is quantised."""
        return self.quantizer.scheme

    def quantized(self) -> Tensor:
        """The float32 weight at the current width, the shape of ``original``."""
        result: Tensor = self.quantizer(self.original)
        return result


def quantize_parameter(
    module: nn.Module, parameter: str = "weight", scheme: Scheme = Scheme(), estimator: Estimator = "identity"
) -> None:
    """Make a module multiply with a quantised parameter.

    Args:
        module: Any module; changed in place. Its class becomes a subclass of what it was.
        parameter: Name of a float32 parameter of its own.
        scheme: The weight quantiser.
        estimator: The straight-through estimator.

    Raises:
        UsageError: The parameter has a parametrization already.
    """
    if parametrize.is_parametrized(module, parameter):
        raise UsageError(f"{parameter} of a {type(module).__name__} is computed already; quantise a plain parameter")
    # unsafe: the check would run the quantiser on weights that may have no memory yet.
    parametrize.register_parametrization(module, parameter, WeightQuantizer(scheme, estimator), unsafe=True)
    if isinstance(module, nn.RNNBase):
        read_weights_in_calls(module)
    module.register_state_dict_post_hook(_with_plain_keys)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_with_parametrized_keys)  # type: ignore[no-untyped-call]


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantised parameters of a network by name (``layers.0.conv0.weight``), in definition order."""
    weights = [
        QuantizedWeight(module_name, parameter, module, quantizer)
        for module_name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for parameter in module.parametrizations
        for quantizer in _parametrizations(module, parameter)
        if isinstance(quantizer, WeightQuantizer)
    ]
    return {weight.name: weight for weight in weights}


def is_quantized(module: nn.Module) -> bool:
    """Whether a module has a quantised parameter of its own."""
    return parametrize.is_parametrized(module) and any(
        isinstance(quantizer, WeightQuantizer)
        for parameter in module.parametrizations  # type: ignore[union-attr]
        for quantizer in _parametrizations(module, parameter)
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """The network itself, without DataParallel or ``torch.compile`` around it, which put names in front of its own."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(compiled := module._modules.get("_orig_mod"), nn.Module):
            module = compiled
        else:
            return module


def set_quantizer(model: nn.Module, scheme: Scheme | None = None, estimator: Estimator | None = None) -> None:
    """Choose quantiser or straight-through estimator of every quantised weight, also of a network already built.

    Args:
        model: A prepared network; changed in place.
        scheme: The weight quantiser; None leaves it. Say the same in the checkpoint's ``CheckpointInfo``.
        estimator: ``identity`` or ``scaled``; None leaves it. A checkpoint does not record it, as files do not depend
            on it: set it again to train on.

    Raises:
        UsageError: There is no such estimator.
    """
    if estimator not in (None, *get_args(Estimator)):
        raise UsageError(f"there is no estimator {estimator!r}; choose {' or '.join(get_args(Estimator))}")
    for weight in quantized_weights(model).values():
        weight.quantizer.scheme = scheme or weight.quantizer.scheme
        weight.quantizer.estimator = estimator or weight.quantizer.estimator


def plain_name(name: str) -> str:
    """A name without what parametrization puts in: ``conv.parametrizations.weight.0.codes`` is ``conv.weight.codes``.

    Example:
        >>> plain_name("layers.0.conv0.parametrizations.weight.original")
        'layers.0.conv0.weight'
    """
    return _PARAMETRIZED.sub(r"\1\2", name)


def _parametrizations(module: nn.Module, parameter: str) -> nn.ModuleList:
    """The parametrizations that a parameter passes through when its module reads it."""
    parametrizations = module.parametrizations[parameter]  # type: ignore[index]
    assert isinstance(parametrizations, nn.ModuleList)
    return parametrizations


def _own_keys(module: nn.Module, prefix: str) -> Mapping[str, str]:
    """Plain key by parametrized key, of the quantised parameters of one module."""
    return {
        f"{prefix}parametrizations.{parameter}.original": f"{prefix}{parameter}"
        for parameter in module.parametrizations  # type: ignore[union-attr]
        if any(isinstance(part, WeightQuantizer) for part in _parametrizations(module, parameter))
    }


def _with_plain_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Give the quantised parameters of a module, just written to a state dict, their plain keys and their place."""
    plain = _own_keys(module, prefix)
    own = [key for key in state_dict if key.startswith(prefix)]
    values = {key: state_dict.pop(key) for key in own}
    for key in sorted(own, key=lambda key: key not in plain):  # as a module without parametrizations has them
        state_dict[plain.get(key, key)] = values[key]


def _with_parametrized_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a module find its quantised parameters under the plain keys of a state dict."""
    for parametrized, plain in _own_keys(module, prefix).items():
        if plain in state_dict:
            state_dict[parametrized] = state_dict.pop(plain)
