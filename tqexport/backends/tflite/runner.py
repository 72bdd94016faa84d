"""Running TFLite files for verification: with their inner values, and from one activation quantiser to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tqexport.backends.coded_weight import joined
from tqexport.backends.grouping import in_groups, put_together
from tqexport.backends.running import Runner
from tqexport.backends.tflite.file import single_graph
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator
from tqexport.backends.tflite.integers import stored_integers
from tqexport.backends.tflite.layout import batch_to_channels_last, to_channels_first
from tqexport.backends.tflite.provenance import filters
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.layer_kinds import FILTER_OPERATORS

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch

__all__ = ["TfliteRunner", "TfliteStretches"]

_CALCULATIONS = 3  # between shifted codes and the filter that they become
_KEPT_OPERATORS = {*FILTER_OPERATORS, "ADD", "RELU"}  # operators whose results are kept


class TfliteRunner(Runner):
    """A TFLite file in LiteRT, and a copy of it whose codes, activations and layer outputs are outputs."""

    runtime = "LiteRT"

    def __init__(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_runner`."""
        flat, facts = single_graph(content, bits)
        self._channels_first: Collection[str] = facts.channels_first if facts else ()
        self._steps: Mapping[str, int] = facts.steps_in_front if facts else {}
        self._stored = stored_integers(flat) if bits is None else {}
        self._shifted = {} if bits is None else _shifted_codes(flat)
        activations, values, self._of_all_samples = _kept_tensors(flat, layers=not deployed)
        outputs = flat.output_names
        super().__init__(outputs, list(activations.values()), list(values.values()), deployed=deployed)
        self._inputs = flat.input_names
        kept = [*flat.graph.outputs, *activations, *values, *self._shifted]
        flat.graph.outputs = np.array(kept, np.int32)
        flat.model.signatureDefs = None
        self._traced = LiteRTSession(flat.pack(), xnnpack=deployed)
        self._untouched = LiteRTSession(content, bits=bits, xnnpack=deployed)

    def run_traced(self, batch: Batch) -> tuple[dict[str, list[Array]], list[Array]]:
        samples = self._in_file(batch)
        traced, counts = [], []
        for group, count in in_groups(samples, self._traced.batch):
            traced.append(self._traced.run_group(*group))
            counts.append(count)
        shifted = traced[0][-len(self._shifted) :] if self._shifted else ()
        codes = {name: list(places) for name, places in self._stored.items()}
        for (name, axes), value in zip(self._shifted.values(), shifted, strict=True):
            codes.setdefault(name, []).append(value.transpose(axes))
        names = (*self._outputs, *self._activations, *self._values)
        columns = zip(*(parts[: len(names)] for parts in traced), strict=True)
        return joined(codes), [
            to_channels_first(self._of_samples(name, parts, counts), kept=name in self._channels_first)
            for name, parts in zip(names, columns, strict=True)
        ]

    def run_untouched(self, batch: Batch) -> list[Array]:
        values = self._untouched.run(self._in_file(batch))
        return [
            to_channels_first(value, kept=name in self._channels_first)
            for name, value in zip(self._outputs, values, strict=True)
        ]

    @property
    def batch(self) -> int:
        return self._untouched.batch

    def _of_samples(self, name: str, parts: Sequence[Array], counts: Sequence[int]) -> Array:
        """A value of all samples from those of groups, each of which has so many of them."""
        if name in self._of_all_samples:
            return parts[0]
        return put_together(parts, counts, self._traced.batch, self._steps.get(name, 1))

    def _in_file(self, batch: Batch) -> Batch:
        """Samples in the layout of the file, if they fit it."""
        if len(batch) == len(self._inputs):
            batch = batch_to_channels_last(batch, self._inputs, self._channels_first)
        self._untouched.check(batch)
        return batch


class TfliteStretches:
    """A TFLite file cut at its roundings: their results are inputs, and what they would have rounded is output."""

    def __init__(self, content: bytes, bits: int | None, activations: Collection[str]) -> None:
        """Open a file; see :meth:`tqexport.backends.base.Backend.open_stretches`."""
        flat, facts = single_graph(content, bits)
        self._channels_first: Collection[str] = facts.channels_first if facts else ()
        kept: list[Operator] = []
        cut: list[Operator] = []
        _, _, of_all_samples = _kept_tensors(flat, layers=False)
        for operator in flat.graph.operators:
            name = flat.name(int(operator.outputs[0]))
            is_cut = flat.operator_name(operator) == "ROUND" and name in activations and name not in of_all_samples
            (cut if is_cut else kept).append(operator)
        flat.graph.operators = kept
        self._inputs = flat.input_names
        self._outputs = flat.output_names
        flat.graph.inputs = np.array([*flat.graph.inputs, *(rounding.outputs[0] for rounding in cut)], np.int32)
        flat.graph.outputs = np.array([*flat.graph.outputs, *(rounding.inputs[0] for rounding in cut)], np.int32)
        flat.model.signatureDefs = None
        self._names = [flat.name(int(rounding.outputs[0])) for rounding in cut]
        self._session = LiteRTSession(flat.pack())

    def __call__(self, batch: Batch, levels: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        batch = (*batch, *(levels[name] for name in self._names))
        values = self._session.run(batch_to_channels_last(batch, (*self._inputs, *self._names), self._channels_first))
        moved = [
            to_channels_first(value, kept=name in self._channels_first)
            for name, value in zip((*self._outputs, *self._names), values, strict=True)
        ]
        return moved[: len(self._outputs)], dict(zip(self._names, moved[len(self._outputs) :], strict=True))


def _kept_tensors(flat: FlatModel, *, layers: bool) -> tuple[dict[int, str], dict[int, str], set[str]]:
    """Names by index: the activations, and the outputs of layers that are not outputs of the file.

    And the names of the activations that are the same for all samples.
    """
    activations: dict[int, str] = {}
    values: dict[int, str] = {}
    of_all_samples = set()
    of_sample = {int(index) for index in flat.graph.inputs}
    for operator in flat.graph.operators:
        kind, output = flat.operator_name(operator), int(operator.outputs[0])
        is_of_sample = not of_sample.isdisjoint(map(int, operator.inputs))
        if is_of_sample:
            of_sample.update(map(int, operator.outputs))
        if kind == "ROUND":
            activations[output] = flat.name(output)
            if not is_of_sample:
                of_all_samples.add(flat.name(output))
        elif layers and is_of_sample and kind in _KEPT_OPERATORS and output not in flat.graph.outputs:
            values[output] = f"{flat.name(output)}#{output}"  # names need not be unique
    return activations, values, of_all_samples


def _shifted_codes(flat: FlatModel) -> dict[int, tuple[str, tuple[int, ...]]]:
    """By index, the tensors of shifted codes: name of the weight, and its axes in PyTorch's order."""
    kinds, shifted = filters(flat), {}
    readers = {int(operator.inputs[0]): operator for operator in flat.graph.operators if len(operator.inputs)}
    for operator in flat.graph.operators:
        if flat.operator_name(operator) != "RIGHT_SHIFT":
            continue
        value = codes = int(operator.outputs[0])
        for _ in range(_CALCULATIONS):  # cast, scale, offset; wherever they stand among the operators
            value = int(readers[value].outputs[0]) if value in readers else value
        if value in kinds:
            shifted[codes] = (flat.name(value), FILTER_OPERATORS[kinds[value]].torch_axes)
    return shifted
