"""One conversion for every width: a TFLite graph, and where in it each parameter of the network went.

The network is converted with *fingerprints*, random numbers in the place of its parameters. Each float constant of the
result is then recognised as one parameter, perhaps in another axis order, perhaps divided by the number of steps of an
activation quantiser (the converter moves such factors into filters). A width is the same graph with its own parameters
in these places. The graph cannot depend on a parameter that happens to be 0 or 1 at some width, either.

A large filter of a convolution has one random number all over, which TensorFlow handles as quickly as a scalar. Its
axis order in the file is that of the operator that reads it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tqexport.backends.onnx.file import CONSTANT_PREFIX, LEVELS_SUFFIX
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.provenance import FilterOrigin, Folded, filters
from tqexport.layer_kinds import FILTER_OPERATORS

__all__ = ["TfliteTemplate", "graph_key", "locate_parameters", "parameters", "with_fingerprints"]

Array = npt.NDArray[np.float32]

_LEVELS = 2.0**20  # of an activation quantiser, about
_LARGE = 1 << 14  # elements; TensorFlow moves each of them about several times

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """A constant of the file: a parameter or its reciprocal, divided by a number of steps."""

    parameter: str
    operator: str | None = None  # what reads it as its filter, in the axis order of such filters
    reciprocal: bool = False
    divided_by: str | None = None


@dataclass(frozen=True)
class TfliteTemplate:
    """A converted graph whose parameters are known by name.

    Attributes:
        content: The file, with fingerprints in it.
        places: What each constant tensor is, by its index.
    """

    content: bytes
    places: Mapping[int, _Place]

    def fill(self, values: Mapping[str, Array]) -> FlatModel:
        """The graph with the parameters of one width, float32 by name."""
        flat = FlatModel(self.content)
        for index, place in self.places.items():
            value = values[place.parameter]
            if place.reciprocal:
                value = np.reciprocal(value)
            if place.divided_by is not None:
                value = np.divide(value, values[place.divided_by], dtype=np.float32)
            shape = flat.shape(index)
            if place.operator is not None:
                value = FILTER_OPERATORS[place.operator].from_torch(value, shape)
            flat.set_constant(index, np.ascontiguousarray(value.reshape(shape), np.float32))
        return flat

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
            if place is None or place.reciprocal:
                continue
            weight = folded.get(place.parameter, Folded(place.parameter, None))
            steps = 1.0 if place.divided_by is None else float(values[place.divided_by])
            origins.append(FilterOrigin(index, operator, weight.weight, weight.gain, steps))
        return origins


def parameters(model: onnx.ModelProto) -> dict[str, Array]:
    """The float32 initializers that belong to the network, not to its operators, by name."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.startswith(CONSTANT_PREFIX)
    }


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


def with_fingerprints(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with random numbers as its parameters, always the same ones.

    It is one that tells its axes apart, as onnx2tf tries orders of axes on it: values neither grow from layer to layer,
    nor are they rounded to a few levels.
    """
    changed = copy.deepcopy(model)
    random = np.random.default_rng(0)
    names = set(parameters(model))
    filters_alone = _read_as_filters_alone(model)
    del changed.metadata_props[:]  # which differ between the widths of one graph
    for tensor in changed.graph.initializer:
        if tensor.name in names:
            shape = tuple(tensor.dims)
            uniform = tensor.name in filters_alone and np.prod(shape) >= _LARGE
            value = random.random(() if uniform else shape, np.float32) + np.float32(0.5)
            if tensor.name.endswith(LEVELS_SUFFIX):
                value = value * _LEVELS
            elif len(shape) > 1:
                summed = np.prod(shape[1:])
                value = value / summed if uniform else random.choice((-1, 1), shape) * value / np.sqrt(summed)
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, value, np.float32), tensor.name))
    return changed


def _read_as_filters_alone(model: onnx.ModelProto) -> set[str]:
    """The values that convolutions read as their filter, and that nothing reads otherwise."""
    uses = [(name, node.op_type == "Conv" and i == 1) for node in model.graph.node for i, name in enumerate(node.input)]
    return {name for name, _ in uses} - {name for name, as_filter in uses if not as_filter}


def locate_parameters(content: bytes, fingerprinted: onnx.ModelProto) -> TfliteTemplate | None:
    """Recognise every constant of a file that was converted from a network with fingerprints.

    Returns:
        The template; None where the converter combined parameters in a way that is not recognised.
    """
    flat = FlatModel(content)
    known = parameters(fingerprinted)
    steps = {name: value for name, value in known.items() if name.endswith(LEVELS_SUFFIX)}
    constants = _of_operators(fingerprinted)
    kinds = filters(flat)
    places: dict[int, _Place] = {}
    for index in range(len(flat.graph.tensors)):
        value = flat.constant(index)
        if value is None or value.dtype != np.float32:
            continue
        candidates = _recognise(value, kinds.get(index), known, steps)
        if len(candidates) == 1:
            places[index] = candidates[0]
        elif candidates or not (_is_plain(value) or any(_is_same(value, constant) for constant in constants)):
            could_be = candidates or "nothing"
            _log.debug("constant %d of the TFLite file, shape %s, could be: %s", index, value.shape, could_be)
            return None
    return TfliteTemplate(content, places)


def _recognise(
    value: Array, operator: str | None, known: Mapping[str, Array], steps: Mapping[str, Array]
) -> list[_Place]:
    """Everything that a constant may be, up to rounding; ``operator`` reads it as its filter, if one does."""
    flat = (value.transpose(FILTER_OPERATORS[operator].torch_axes) if operator else value).ravel()
    candidates = []
    for name, parameter in known.items():
        if parameter.size != flat.size:
            continue
        fingerprint = parameter.ravel()
        if name in steps and _equal(flat, np.reciprocal(fingerprint)):
            candidates.append(_Place(name, operator, reciprocal=True))
        if _equal(flat, fingerprint):
            candidates.append(_Place(name, operator))
        if flat.size > 1:
            candidates += [
                _Place(name, operator, divided_by=divisor)
                for divisor, levels in steps.items()
                if _equal(flat[:1], fingerprint[:1] / levels) and _equal(flat, fingerprint / levels)
            ]
    return candidates


def _equal(a: Array, b: Array) -> bool:
    """Whether two vectors agree up to rounding; most of those that do not differ at the start."""
    return bool(np.allclose(a[:16], b[:16], rtol=1e-6, atol=0) and np.allclose(a, b, rtol=1e-6, atol=0))


def _of_operators(model: onnx.ModelProto) -> list[Array]:
    """What operators have of their own, alike at every width: the scale of attention, the epsilon of LayerNorm."""
    constants = [
        numpy_helper.to_array(tensor).ravel()
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name.startswith(CONSTANT_PREFIX)
    ]
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    return constants + [
        np.array([attribute.f], np.float32) for attribute in attributes if attribute.type == onnx.AttributeProto.FLOAT
    ]


def _is_same(value: Array, constant: Array) -> bool:
    """Whether a constant of the file is one that an operator of the network has."""
    return value.size == constant.size and _equal(value.ravel(), constant)


def _is_plain(value: Array) -> bool:
    """Whether a constant holds short numbers (0, 1, 0.5) or infinities alone, which no fingerprint leads to."""
    with np.errstate(over="ignore"):
        return bool(np.all((value * 1024 == np.round(value * 1024)) | (np.abs(value) > 1e30)))
