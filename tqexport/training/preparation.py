"""Turn an ordinary PyTorch network into a truncation-ready one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

from torch import nn

from tqexport.errors import UsageError
from tqexport.training.layers import (
    ActivationQuantizer,
    Estimator,
    SwitchableBatchNorm1d,
    SwitchableBatchNorm2d,
    TruncConv1d,
    TruncConv2d,
    TruncLinear,
    set_quantizer,
)
from tqexport.truncation import Scheme

__all__ = ["prepare"]

_WEIGHTED: dict[type[nn.Module], type[TruncConv1d] | type[TruncConv2d] | type[TruncLinear]] = {
    nn.Conv1d: TruncConv1d,
    nn.Conv2d: TruncConv2d,
    nn.Linear: TruncLinear,
}
_NORMS = {nn.BatchNorm1d: SwitchableBatchNorm1d, nn.BatchNorm2d: SwitchableBatchNorm2d}


def prepare(
    model: nn.Module,
    widths: Iterable[int] = (1, 2, 4, 8),
    *,
    scheme: Scheme = Scheme(),
    estimator: Estimator = "identity",
    float_layers: Collection[str] | None = None,
    quantize_activations: bool = True,
) -> nn.Module:
    """Copy a network, its Conv/Linear/BatchNorm/ReLU modules replaced by truncation-ready ones.

    Weights are kept, so a trained float network can be fine-tuned. Only modules of exactly these classes are replaced;
    a ReLU called as a function is not seen.

    Args:
        model: Any nn.Module. It is not changed.
        widths: The widths that get a BatchNorm of their own (1 to 8, or 32).
        scheme: The weight quantiser.
        estimator: The straight-through estimator.
        float_layers: Names of Conv/Linear modules to leave in float32. Default: the first and the last one.
        quantize_activations: Replace ``nn.ReLU`` by the activation quantiser.

    Raises:
        UsageError: A name in ``float_layers`` is no Conv or Linear module of the network, these names leave nothing to
            quantise, or there is no such estimator.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [type(layer).__name__ for layer in prepare(net)]
        ['Linear', 'ActivationQuantizer', 'TruncLinear', 'ActivationQuantizer', 'Linear']
    """
    widths = tuple(widths)
    model = copy.deepcopy(model)
    weighted = [name for name, module in model.named_modules() if type(module) in _WEIGHTED]
    if float_layers is None:
        float_layers = {*weighted[:1], *weighted[-1:]}
    if unknown := sorted(set(float_layers) - set(weighted)):
        raise UsageError(f"float_layers names {unknown}, but the Conv and Linear layers are {weighted}")
    if not set(weighted) - set(float_layers):
        raise UsageError(f"nothing is left to quantise of the layers {weighted}; name fewer of them in float_layers")

    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if type(module) in _WEIGHTED and name not in float_layers:
            replaced[module] = _truncatable(module)
        elif type(module) in _NORMS:
            replaced[module] = _switchable(module, widths)
        elif type(module) is nn.ReLU and quantize_activations:
            replaced[module] = ActivationQuantizer()
    for parent in [*model.modules()]:
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # else it computes with its layers' weights, not with its layers
        for child_name, child in parent._modules.items():
            if child in replaced:
                parent._modules[child_name] = replaced[child]
    model = replaced.get(model, model)
    set_quantizer(model, scheme, estimator)
    return model


def _truncatable(module: nn.Module) -> nn.Module:
    """A quantised twin that shares nothing but the values; built by class change, so no argument can be forgotten."""
    twin = copy.deepcopy(module)
    twin.__class__ = _WEIGHTED[type(module)]
    return twin


def _switchable(module: nn.Module, widths: tuple[int, ...]) -> nn.Module:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    norm = _NORMS[type(module)](module.num_features, widths)
    for key in norm.bn_dict:
        norm.bn_dict[key] = copy.deepcopy(module)
    return norm
