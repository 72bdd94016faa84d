"""Turn an ordinary PyTorch network into a truncation-ready one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from tqexport.errors import UsageError
from tqexport.integer.training import grids_for_training
from tqexport.layer_kinds import LAYER_KINDS, LayerKind
from tqexport.training.layers import SwitchableBatchNorm1d, SwitchableBatchNorm2d, SwitchableBatchNorm3d
from tqexport.training.quantizers import (
    ActivationQuantizer,
    Estimator,
    is_quantized,
    quantize_parameter,
    set_quantizer,
    unwrapped,
)
from tqexport.training.ranges import RangeQuantizer, behind_relu, quantize_input
from tqexport.truncation import Scheme

__all__ = ["kind_that_prepare_takes", "prepare"]

_log = logging.getLogger(__name__)

_CLASSES = {getattr(nn, kind.name): kind for kind in LAYER_KINDS}
_CLASSES[nn.modules.linear.NonDynamicallyQuantizableLinear] = _CLASSES[nn.Linear]  # the out_proj of attention
_NORMS = {
    nn.BatchNorm1d: SwitchableBatchNorm1d,
    nn.BatchNorm2d: SwitchableBatchNorm2d,
    nn.BatchNorm3d: SwitchableBatchNorm3d,
}


def prepare(
    model: nn.Module,
    widths: Iterable[int] = (1, 2, 4, 8),
    *,
    scheme: Scheme = Scheme(),
    estimator: Estimator = "identity",
    float_layers: Collection[str] | None = None,
    quantize_activations: bool = True,
    learned_ranges: bool | Collection[str] = False,
    integer: bool = False,
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Copy a network and make the copy truncation-ready: its layers' weights, its BatchNorms, its ReLUs.

    The weights of convolutions and linear layers get a quantiser in front (the kinds of layer are listed in
    :mod:`tqexport.layer_kinds`); their values are kept, so a trained float network can be fine-tuned. BatchNorms
    become one per width, ReLUs become activation quantisers. Classes derived from convolutions, linear layers and
    embeddings are quantised like these, other derived classes stay as they are, and a ReLU called as a function is not
    seen. A network in DataParallel or from ``torch.compile`` is taken out of it, and what weight norm or another
    parametrization computes becomes a plain parameter in the layers that are quantised. Conv1D of transformers, as in
    GPT-2, is a linear layer that has its weight turned, and becomes ``nn.Linear``.

    With ``learned_ranges`` activations have ranges that are learned instead of 0 to 1, for networks without BatchNorms:
    ReLUs become quantisers of 0 to r, and the input of every quantised layer that no ReLU of the same ``nn.Sequential``
    gives is rounded to levels of -r to r (:class:`tqexport.training.ranges.RangeQuantizer`).

    With ``integer`` the network trains as the integer network that it will be: every value that no activation quantiser
    rounds gets an 8-bit grid per width, which follows the values while the network is in training mode, and the layers
    that stay in float multiply with weights rounded to int8. ``save_checkpoint`` writes it as ``tqexport calibrate``
    writes a calibrated network.

    Args:
        model: Any nn.Module. It is not changed.
        widths: The widths that get a BatchNorm of their own (1 to 8, or 32).
        scheme: The weight quantiser.
        estimator: The straight-through estimator.
        float_layers: Names of layers to leave in float32. Default: the first and the last one, and those that have a
            weight in common with them.
        quantize_activations: Replace ``nn.ReLU`` by the activation quantiser.
        learned_ranges: Learn the ranges of activations, signed ones too; names of quantised layers stand for those
            whose input is rounded, in place of the rule above.
        integer: Put in the grids that integers from end to end need; the widths are then 1 to 8.
        input_shape: Shape of one sample without the batch, which ``integer`` needs to see what the network computes.

    Raises:
        UsageError: A name in ``float_layers`` is no such layer of the network, these names leave nothing to quantise,
            a name in ``learned_ranges`` is no quantised layer that takes numbers, a weight is no parameter, there is no
            such estimator, two options exclude each other, or a width or the quantiser has no integer form.
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
    if learned_ranges and (integer or not quantize_activations):
        option = "integer=True" if integer else "quantize_activations=False"
        raise UsageError(f"learned_ranges is about activations that {option} does not have; leave one of them out")
    widths = tuple(widths)
    model = unwrapped(model)
    _check_parameters(model)
    model = _with_linear_layers(copy.deepcopy(model))
    layers = {name: module for name, module in model.named_modules() if _kind_of(module) is not None}
    if float_layers is None:
        float_layers = _first_and_last(layers)
    if unknown := sorted(set(float_layers) - set(layers)):
        raise UsageError(f"float_layers names {unknown}, but the layers that can be quantised are {list(layers)}")
    if not set(layers) - set(float_layers):
        raise UsageError(
            f"nothing is left to quantise of the layers {list(layers)}; name fewer of them in float_layers"
        )
    _quantize(layers, float_layers)
    if learned_ranges:
        _quantize_inputs(model, learned_ranges)

    replaced: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if type(module) in _NORMS:
            replaced[module] = _switchable(module, widths)
        elif type(module) is nn.ReLU and quantize_activations:
            replaced[module] = RangeQuantizer(signed=False) if learned_ranges else ActivationQuantizer()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else it computes with its layers' weights, not with its layers
    model = _with_replaced(model, replaced)
    set_quantizer(model, scheme, estimator)
    if input_shape is not None:
        grids_for_training(model, widths, input_shape, scheme)
    return model


def _with_linear_layers(model: nn.Module) -> nn.Module:
    """Put ``nn.Linear`` in the place of each Conv1D of transformers; changes the network."""
    linear: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
            weight, bias = (module.get_parameter(parameter) for parameter in ("weight", "bias"))
            linear[module] = layer = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
            layer.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
            layer.bias = nn.Parameter(bias.detach(), bias.requires_grad)
            layer.train(module.training)
            _log.warning("layer %s: it is a Conv1D of transformers; it is a Linear now, whose weight is turned", name)
    return _with_replaced(model, linear)


def _with_replaced(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in the place of some, under all their names; changes the network."""
    for parent in [*model.modules()]:
        for name, child in parent._modules.items():
            if child is not None and child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(model, model)


def _first_and_last(layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the first and the last layer, and of those that share a parameter with them."""
    parameters = {name: {id(parameter) for parameter in layer.parameters()} for name, layer in layers.items()}
    ends = {*list(layers)[:1], *list(layers)[-1:]}
    return {name for name in layers if any(name == end or parameters[name] & parameters[end] for end in ends)}


def _quantize(layers: Mapping[str, nn.Module], float_layers: Collection[str]) -> None:
    """Quantise the parameters of all layers but those that stay in float."""
    kinds = {name: _kind_of(layer) for name, layer in layers.items()}
    multiplying = {name: kind.parameters_of(layers[name]) for name, kind in kinds.items() if kind is not None}
    in_float = {
        id(layers[name]._parameters[parameter]): name
        for name in float_layers
        for parameter in multiplying[name]
        if parameter in layers[name]._parameters
    }
    for name, layer in layers.items():
        if name in float_layers:
            continue
        _compute_once(name, layer)
        for parameter in multiplying[name]:
            if (other := in_float.get(id(layer._parameters[parameter]))) is not None:
                raise UsageError(
                    f"{other} stays in float and has the same weight as {name}, which is quantised; name both of them "
                    "in float_layers, or neither"
                )
            quantize_parameter(layer, parameter)
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
            option = "sparse" if layer.sparse else "max_norm"
            raise UsageError(f"{name} is an Embedding with {option}, which a quantised table cannot have; leave it out")


def _quantize_inputs(model: nn.Module, names: bool | Collection[str]) -> None:
    """Round the inputs of quantised layers: of those named, or of those that read something else than a ReLU."""
    quantized = {
        name: module
        for name, module in model.named_modules()
        # The one takes indices, the other is never called: attention computes with its weight.
        if is_quantized(module)
        and not isinstance(module, (nn.Embedding, nn.modules.linear.NonDynamicallyQuantizableLinear))
    }
    if isinstance(names, bool):
        already = behind_relu(model)
        names = [name for name, module in quantized.items() if module not in already]
    elif unknown := sorted(set(names) - set(quantized)):
        raise UsageError(
            f"learned_ranges names {unknown}, but the quantised layers that take numbers are {list(quantized)}"
        )
    for name in names:
        quantize_input(quantized[name])


def kind_that_prepare_takes(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that :func:`prepare` quantises, quantised or not; None for any other module.

    A class derived from a convolution, a linear layer or an embedding is one of these, whatever its forward does with
    its weight: it reads the quantised one. What is derived from attention or from a recurrent layer is none, as these
    hand their weights on in a way of their own.
    """
    kind = parametrize.type_before_parametrizations(module)
    known = next((_CLASSES[base] for base in kind.__mro__ if base in _CLASSES), None)
    return known if known is None or kind in _CLASSES or known.parameters == ("weight",) else None


def _kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that is still to be quantised; None for any other module."""
    return None if is_quantized(module) else kind_that_prepare_takes(module)


def _check_parameters(model: nn.Module) -> None:
    """Refuse a weight that a hook computes, as PyTorch's older weight norm and its pruning do."""
    for name, module in model.named_modules():
        kind = _kind_of(module)
        if kind is None or parametrize.is_parametrized(module):
            continue
        for parameter in kind.parameters_of(module):
            if parameter not in module._parameters:
                raise UsageError(
                    f"{parameter} of layer {name} is no parameter but computed before every call; make it one, with "
                    "remove_weight_norm or remove_spectral_norm of torch.nn.utils or with prune.remove"
                )


def _compute_once(name: str, layer: nn.Module) -> None:
    """Make parameters of what parametrizations compute, such as weight norm; the layer is a copy."""
    if not parametrize.is_parametrized(layer):
        return
    parametrizations = layer.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    parametrizations.eval()  # else spectral norm takes a step
    with torch.no_grad():
        values = {parameter: getattr(layer, parameter).clone() for parameter in parametrizations}
    for parameter, parametrization in parametrizations.items():
        computing = " and ".join(type(part).__name__.lstrip("_") for part in parametrization.children())
        _log.warning(
            "layer %s: its %s was computed by %s; it is a parameter of its own now, which is quantised and trained",
            *(name, parameter, computing),
        )
    # Not by remove_parametrizations, which changes a class that the network shares with its copy.
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for parameter, value in values.items():
        layer.register_parameter(parameter, nn.Parameter(value))


def _switchable(module: nn.Module, widths: tuple[int, ...]) -> nn.Module:
    """One copy of a BatchNorm for each width."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    norm = _NORMS[type(module)](module.num_features, widths)
    for key in norm.bn_dict:
        norm.bn_dict[key] = copy.deepcopy(module)
    return norm
