"""One conversion for every width: a TFLite graph, and where in it each parameter of the network went.

The network is converted with *fingerprints*, random numbers in the place of its parameters, by which each constant of
the result is recognised (``fingerprints.py``). A width is the same graph with its own parameters in these places. The
graph cannot depend on a parameter that happens to be 0 or 1 at some width, either. Where the converter combined
parameters beyond recognition, it converts the network once more without knowing them (``given.py``): the file computes
then what they make.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from tqexport.backends.onnx.file import depending_on
from tqexport.backends.onnx.samples_apart import samples_of
from tqexport.backends.tflite.fingerprints import Fingerprints, Product, Sum, parameters, with_fingerprints
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.given import with_given_as_constants, with_given_as_inputs
from tqexport.backends.tflite.onnx2tf import in_converters_order, run_onnx2tf
from tqexport.backends.tflite.provenance import FilterOrigin, Folded, filters
from tqexport.errors import ConversionError
from tqexport.layer_kinds import FILTER_OPERATORS, ONNX_OPERATORS

__all__ = ["TfliteTemplate", "convert_to_templates", "graph_key"]

Array = npt.NDArray[np.float32]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TfliteTemplate:
    """A converted graph whose parameters are known by name.

    Attributes:
        content: The file, with fingerprints in it.
        parameters: Names of the network's parameters.
        places: What each constant tensor is made of, by its index; no constant of the operators is among them.
        unrecognised: The constants that may be made of parameters, nobody knows how: who reads each.
        rounds: Names of the results of Round in the network, as the converter numbers them.
    """

    content: bytes
    parameters: Collection[str]
    places: Mapping[int, Product | Sum]
    unrecognised: Sequence[str]
    rounds: Sequence[str]

    def fill(self, values: Mapping[str, Array]) -> FlatModel:
        """The graph with the parameters of one width, float32 by name."""
        flat = FlatModel(self.content)
        for index, place in self.places.items():
            value = place.value(values, flat.shape(index))
            flat.set_constant(index, np.ascontiguousarray(value, np.float32))
        return flat

    def combined(self) -> set[str]:
        """The parameters that are nowhere in the file by themselves."""
        products = [place for place in self.places.values() if isinstance(place, Product)]
        alone = {place.parameter for place in products if place.gain is None and place.number == 1}
        return {*self.parameters} - alone - {place.levels for place in products}

    def origins(self, flat: FlatModel, values: Mapping[str, Array], folded: Mapping[str, Folded]) -> list[FilterOrigin]:
        """Where each filter of a graph from :meth:`fill` comes from.

        Args:
            flat: From :meth:`fill`.
            values: The parameters that it was filled with.
            folded: What these were computed from.
        """
        origins = []
        for index, operator in filters(flat).items():
            place = self.places.get(index)
            if not isinstance(place, Product) or place.reciprocal or place.axes is not None:
                continue
            weight = folded.get(place.parameter, Folded(place.parameter, None))
            gains = [gain for gain in (weight.gain, place.gains(values)) if gain is not None]
            steps = 1.0 if place.levels is None else float(values[place.levels])
            origins.append(FilterOrigin(index, operator, weight.weight, tuple(gains), steps))
        return origins


def graph_key(model: onnx.ModelProto) -> bytes:
    """Equal for two networks that differ in the values of their parameters alone."""
    bare = onnx.ModelProto(graph=model.graph)
    names = set(parameters(model))
    for tensor in bare.graph.initializer:
        if tensor.name in names:
            tensor.ClearField("raw_data")
            del tensor.float_data[:]
    key: bytes = bare.SerializeToString(deterministic=True)
    return key


def convert_to_templates(
    models: Sequence[onnx.ModelProto], weights: Collection[str], limits: Sequence[int]
) -> list[TfliteTemplate]:
    """Convert float networks, whatever their parameters are, and recognise what became of these.

    Args:
        models: Networks of one signature.
        weights: Names of the parameters that have codes.
        limits: See :func:`tqexport.backends.onnx.samples_apart.samples_of`.

    Raises:
        ConversionError: The converter fails, or combined parameters beyond recognition.
    """
    apart = [_worked_on(model, weights) for model in models]
    templates = _converted(models, weights, apart, limits)
    again = [number for number, template in enumerate(templates) if template.unrecognised]
    if again:
        filters_of = {number: {filter_ for _, filter_ in _multiplied(models[number])} for number in again}
        further = [apart[i] | (templates[i].combined() - filters_of[i] - {*weights}) for i in again]
        retried = _converted([models[number] for number in again], weights, further, limits)
        for number, template in zip(again, retried, strict=True):
            templates[number] = template
    for template in templates:
        if template.unrecognised:
            raise ConversionError(
                f"onnx2tf combined parameters of the network beyond recognition ({template.unrecognised[0]}); "
                "deploy the network as ONNX"
            )
    return templates


def _converted(
    models: Sequence[onnx.ModelProto], weights: Collection[str], apart: Sequence[Collection[str]], limits: Sequence[int]
) -> list[TfliteTemplate]:
    """Convert networks, where the converter does not know those constants of each that are ``apart``."""
    fingerprinted = [with_fingerprints(model) for model in models]
    pairs = [with_given_as_inputs(model, weights, names) for model, names in zip(fingerprinted, apart, strict=True)]
    samples = [(*samples_of(model, limits), *given.values()) for model, (_, given) in zip(models, pairs, strict=True)]
    contents = run_onnx2tf([model for model, _ in pairs], samples)
    return [
        _recognised(with_given_as_constants(content, given), model, _rounds(converted))
        for content, model, (converted, given) in zip(contents, fingerprinted, pairs, strict=True)
    ]


def _worked_on(model: onnx.ModelProto, weights: Collection[str]) -> set[str]:
    """Names of the constants that layers with codes work on; the converter would compute what comes of them."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {data for data, filter_ in _multiplied(model) if filter_ in weights} & constants


def _multiplied(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """What layers work on, and what they multiply it with, by names; a linear layer's weight is turned in between."""
    turned = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    layers = (node for node in model.graph.node if node.op_type in ONNX_OPERATORS and node.op_type != "Gather")
    return [(node.input[0], turned.get(node.input[1], node.input[1])) for node in layers]


def _rounds(model: onnx.ModelProto) -> list[str]:
    """Names of the results of Round, in the order in which the converter meets and numbers them.

    It computes what is the same for every sample at once, without a number.
    """
    of_sample = depending_on(model, (value.name for value in model.graph.input), sizes=False)
    roundings = (node for node in model.graph.node if node.op_type == "Round")
    rounding = {node.name: node.output[0] for node in roundings if node.output[0] in of_sample}
    return [rounding[name] for name in in_converters_order(model) if name in rounding]


def _recognised(content: bytes, fingerprinted: onnx.ModelProto, rounds: Sequence[str]) -> TfliteTemplate:
    """Recognise every constant of a file that was converted from a network with fingerprints."""
    flat = FlatModel(content)
    fingerprints = Fingerprints(fingerprinted)
    operators = filters(flat)
    filter_of_bias = _filters_of_biases(flat)
    places: dict[int, Product | Sum] = {}
    unrecognised = []
    for index in sorted(range(len(flat.graph.tensors)), key=lambda index: index not in operators):  # filters first
        value = flat.constant(index)
        if value is None or value.dtype != np.float32:
            continue
        filter_ = places.get(filter_of_bias.get(index, -1))
        if index in operators:
            candidates: Sequence[Product | Sum] = fingerprints.filter(value, operators[index])
        elif isinstance(filter_, Product):
            candidates = fingerprints.other(value, filter_, flat.constant(filter_of_bias[index]))
        else:
            candidates = fingerprints.other(value)
        if len(candidates) == 1:
            places[index] = candidates[0]
        elif candidates or not fingerprints.is_of_operators(value):
            readers = sorted({flat.operator_name(operator) for operator in flat.consumers(index)})
            unrecognised.append(f"a constant of {', '.join(readers)}, shape {value.shape}")
            _log.debug("%s, could be: %s", unrecognised[-1], candidates or "nothing")
    return TfliteTemplate(content, fingerprints.parameters.keys(), places, unrecognised, rounds)


def _filters_of_biases(flat: FlatModel) -> dict[int, int]:
    """For the bias of each linear layer, the layer's filter, by their indices."""
    layout = FILTER_OPERATORS["FULLY_CONNECTED"]
    linear = [operator for operator in flat.graph.operators if flat.operator_name(operator) == "FULLY_CONNECTED"]
    return {
        int(operator.inputs[layout.bias]): int(operator.inputs[layout.filter])
        for operator in linear
        if len(operator.inputs) > layout.bias
    }
