"""Running TFLite files for verification: with a look inside, and stretch by stretch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from tqexport.backends.base import Runner, RuntimeRun
from tqexport.backends.onnx.file import OUTPUT_NAME
from tqexport.backends.tflite.cutting import computed_weights
from tqexport.backends.tflite.file import single_graph
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.integers import stored_integers
from tqexport.backends.tflite.layout import to_channels_first, to_channels_last
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.layer_kinds import FILTER_OPERATORS

if TYPE_CHECKING:
    from tqexport.backends.base import Array, Inputs

__all__ = ["TfliteRunner", "TfliteStretches"]

_RUNTIME = "LiteRT"
_KEPT_OPERATORS = {*FILTER_OPERATORS, "ADD", "RELU"}  # operators whose results are kept


class TfliteRunner(Runner):
    """A TFLite file in LiteRT, and a copy of it whose codes, activations and layer outputs are outputs."""

    def __init__(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_runner`."""
        self._deployed = deployed
        flat, facts = single_graph(content, bits)
        self._channels_first: Collection[str] = facts.channels_first if facts else ()
        self._stored = stored_integers(flat) if bits is None else {}
        self._activations, self._values = _kept_tensors(flat, layers=not deployed)
        self._shifted = {} if bits is None else _shifted_codes(flat)
        outputs = [int(index) for index in flat.graph.outputs]
        self._ends = len(outputs)
        self._values = {index: name for index, name in self._values.items() if index not in outputs}
        flat.graph.outputs = np.array([*outputs, *self._activations, *self._values, *self._shifted], np.int32)
        flat.model.signatureDefs = None
        self._traced = LiteRTSession(flat.pack(), xnnpack=deployed)
        self._untouched = LiteRTSession(content, bits=bits, xnnpack=deployed)

    def run(self, inputs: Inputs) -> RuntimeRun:
        self._untouched.check(to_channels_last(inputs))
        traced = [self._traced.run_sample(sample) for sample in to_channels_last(inputs)]
        of_samples = len(traced[0]) - len(self._shifted)
        names = (OUTPUT_NAME, *self._activations.values(), *self._values.values())
        columns = zip(*(parts[:1] + parts[self._ends : of_samples] for parts in traced), strict=True)
        ends, *inside = (
            to_channels_first(np.concatenate(parts), kept=name in self._channels_first)
            for name, parts in zip(names, columns, strict=True)
        )
        codes = {name: list(places) for name, places in self._stored.items()}
        for (name, axes), value in zip(self._shifted.values(), traced[0][of_samples:], strict=True):
            codes.setdefault(name, []).append(value.transpose(axes))
        return RuntimeRun(
            _RUNTIME,
            codes,
            dict(zip(self._activations.values(), inside, strict=False)),
            dict(zip(self._values.values(), inside[len(self._activations) :], strict=True)),
            ends,
            # LiteRT's own kernels are the same whatever is kept.
            self.run_untouched(inputs) if self._deployed else ends,
        )

    def run_untouched(self, inputs: Inputs) -> Array:
        outputs = self._untouched.run(to_channels_last(inputs))[0]
        return to_channels_first(outputs, kept=OUTPUT_NAME in self._channels_first)


class TfliteStretches:
    """A TFLite file whose roundings are inputs, and what they would have rounded are outputs."""

    def __init__(self, content: bytes, bits: int | None, activations: Collection[str]) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_stretches`."""
        flat, facts = single_graph(content, bits)
        self._channels_first: Collection[str] = facts.channels_first if facts else ()
        cut = {
            flat.name(int(operator.outputs[0])): operator
            for operator in flat.graph.operators
            if flat.operator_name(operator) == "ROUND" and flat.name(int(operator.outputs[0])) in activations
        }
        removed = [id(operator) for operator in cut.values()]
        flat.graph.operators = [operator for operator in flat.graph.operators if id(operator) not in removed]
        roundings = cut.values()
        flat.graph.inputs = np.array([*flat.graph.inputs, *(rounding.outputs[0] for rounding in roundings)], np.int32)
        flat.graph.outputs = np.array([*flat.graph.outputs, *(rounding.inputs[0] for rounding in roundings)], np.int32)
        flat.model.signatureDefs = None
        self._names = list(cut)
        self._session = LiteRTSession(flat.pack())

    def __call__(self, inputs: Inputs, levels: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        given = {name: to_channels_last(levels[name], kept=name in self._channels_first) for name in self._names}
        values = self._session.run(to_channels_last(inputs), given)
        outputs, *rounded = (
            to_channels_first(value, kept=name in self._channels_first)
            for name, value in zip((OUTPUT_NAME, *self._names), values, strict=True)
        )
        return outputs, dict(zip(self._names, rounded, strict=True))


def _kept_tensors(flat: FlatModel, *, layers: bool) -> tuple[dict[int, str], dict[int, str]]:
    """Names by index: the activations, and the outputs of layers."""
    activations: dict[int, str] = {}
    values: dict[int, str] = {}
    of_sample = {int(index) for index in flat.graph.inputs}
    for operator in flat.graph.operators:
        kind, output = flat.operator_name(operator), int(operator.outputs[0])
        if not of_sample.intersection(map(int, operator.inputs)):
            continue
        of_sample.update(map(int, operator.outputs))
        if kind == "ROUND":
            activations[output] = flat.name(output)
        elif layers and kind in _KEPT_OPERATORS:
            values[output] = f"{flat.name(output)}#{output}"  # names need not be unique
    return activations, values


def _shifted_codes(flat: FlatModel) -> dict[int, tuple[str, tuple[int, ...]]]:
    """By index, the tensors of shifted codes: name of the weight, and its axes in PyTorch's order."""
    return {
        weight.shifted: (flat.name(weight.filter), FILTER_OPERATORS[weight.kind].torch_axes)
        for weight in computed_weights(flat)
    }
