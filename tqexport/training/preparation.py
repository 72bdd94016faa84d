"""Turn an ordinary PyTorch network into a truncation-ready one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from tqexport.errors import UsageError
from tqexport.integer.training import grids_for_training
from tqexport.layer_kinds import LAYER_KINDS
from tqexport.training.layers import SwitchableBatchNorm1d, SwitchableBatchNorm2d
from tqexport.training.quantizers import ActivationQuantizer, Estimator, quantize_parameter, set_quantizer
from tqexport.truncation import Scheme

__all__ = ["prepare"]

_KINDS = {getattr(nn, kind.name): kind for kind in LAYER_KINDS}
_NORMS = {nn.BatchNorm1d: SwitchableBatchNorm1d, nn.BatchNorm2d: SwitchableBatchNorm2d}


def prepare(
    model: nn.Module,
    widths: Iterable[int] = (1, 2, 4, 8),
    *,
    scheme: Scheme = Scheme(),
    estimator: Estimator = "identity",
    float_layers: Collection[str] | None = None,
    quantize_activations: bool = True,
    integer: bool = False,
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Copy a network and make the copy truncation-ready: its layers' weights, its BatchNorms, its ReLUs.

    The weights of convolutions and linear layers get a quantiser in front (the kinds of layer are listed in
    :mod:`tqexport.layer_kinds`); their values are kept, so a trained float network can be fine-tuned. BatchNorms
    become one per width, ReLUs become activation quantisers. Only modules of exactly these classes are changed; a ReLU
    called as a function is not seen.

    With ``integer`` the network trains as the integer network that it will be: every value that no activation quantiser
    rounds gets an 8-bit grid per width, which follows the values while the network is in training mode, and the layers
    that stay in float multiply with weights rounded to int8. ``save_checkpoint`` writes it as ``tqexport calibrate``
    writes a calibrated network.

    Args:
        model: Any nn.Module. It is not changed.
        widths: The widths that get a BatchNorm of their own (1 to 8, or 32).
        scheme: The weight quantiser.
        estimator: The straight-through estimator.
        float_layers: Names of layers to leave in float32. Default: the first and the last one.
        quantize_activations: Replace ``nn.ReLU`` by the activation quantiser.
        integer: Put in the grids that integers from end to end need; the widths are then 1 to 8.
        input_shape: Shape of one sample without the batch, which ``integer`` needs to see what the network computes.

    Raises:
        UsageError: A name in ``float_layers`` is no such layer of the network, these names leave nothing to quantise,
            there is no such estimator, or a width or the quantiser has no integer form.
        ConversionError: An operation of the network has no integer form.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [type(layer).__name__ for layer in prepare(net)]
        ['Linear', 'ActivationQuantizer', 'ParametrizedLinear', 'ActivationQuantizer', 'Linear']
    """
    if integer != (input_shape is not None):
        raise UsageError(
            "integer=True needs input_shape, the shape of one sample without the batch, to find what needs a grid"
            if integer
            else "input_shape is for integer=True alone; leave it out, or add integer=True"
        )
    widths = tuple(widths)
    model = copy.deepcopy(model)
    layers = {name: module for name, module in model.named_modules() if type(module) in _KINDS}
    if float_layers is None:
        float_layers = {*list(layers)[:1], *list(layers)[-1:]}
    if unknown := sorted(set(float_layers) - set(layers)):
        raise UsageError(f"float_layers names {unknown}, but the layers that can be quantised are {list(layers)}")
    if not set(layers) - set(float_layers):
        raise UsageError(
            f"nothing is left to quantise of the layers {list(layers)}; name fewer of them in float_layers"
        )
    float_weights = {id(layers[name].weight): name for name in float_layers}
    for name, layer in layers.items():
        if name not in float_layers:
            if (other := float_weights.get(id(layer.weight))) is not None:
                raise UsageError(
                    f"{other} stays in float and has the same weight as {name}, which is quantised; name both of them "
                    "in float_layers, or neither"
                )
            for parameter in _KINDS[type(layer)].parameters:
                quantize_parameter(layer, parameter)

    replaced: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if type(module) in _NORMS:
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
    if input_shape is not None:
        grids_for_training(model, widths, input_shape, scheme)
    return model


def _switchable(module: nn.Module, widths: tuple[int, ...]) -> nn.Module:
    """One copy of a BatchNorm for each width."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    norm = _NORMS[type(module)](module.num_features, widths)
    for key in norm.bn_dict:
        norm.bn_dict[key] = copy.deepcopy(module)
    return norm
