"""Running integer TFLite files for verification: in LiteRT with XNNPACK and without, and in TFLite Micro."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.tflite.file import single_graph
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator
from tqexport.backends.tflite.integer_form import render_tflite
from tqexport.backends.tflite.layout import to_channels_first, to_channels_last
from tqexport.backends.tflite.micro import MicroSession, check_micro
from tqexport.backends.tflite.packing import unpacked_filters
from tqexport.backends.tflite.session import LiteRTSession, in_groups
from tqexport.errors import HostError, InputError
from tqexport.integer.arithmetic import Rounding, to_grid
from tqexport.integer.grids import OFFSET
from tqexport.integer.model import IntegerModel
from tqexport.integer.names import FLOAT_IO, PACKED
from tqexport.integer.naming import INPUT
from tqexport.integer.runtime import IntegerRun, IntegerRuntime, Levels
from tqexport.reading import limits

__all__ = ["open_integer_runtimes"]

Array = npt.NDArray[Any]
Inputs = npt.NDArray[np.float32]


def open_integer_runtimes(
    content: bytes, network: IntegerModel, runtimes: Collection[str] = ()
) -> Iterator[IntegerRuntime]:
    """A file in some runtimes, or in every one that is here; TFLite Micro is an extra.

    A packed file runs in TFLite Micro alone.

    Raises:
        InputError: A runtime does not take it, or it is another network.
        HostError: It is packed, and TFLite Micro is not installed.
    """
    flat, facts = single_graph(content, None)
    assert facts is not None
    packed = facts.kernel == PACKED
    batch = next(iter(flat.shape(int(flat.graph.inputs[0]))), 1) if len(flat.graph.inputs) else 1
    if not 1 <= batch <= limits.BATCH:
        raise InputError(f"takes {batch} samples at once; tqexport writes files of 1 to {limits.BATCH}")
    fresh = FlatModel(render_tflite(network, facts, batch))
    file = _File(content, facts.kernel == FLOAT_IO, batch, tuple(_differing(flat, fresh)))
    unpacked_filters(flat)  # TFLite Micro itself does not look where a stream or table ends
    roundings: tuple[Rounding, ...] = () if packed else ("xnnpack", "litert")
    for rounding in roundings:
        if not runtimes or rounding in runtimes:
            yield _LiteRT(file, network, rounding)
    if runtimes and _Micro.key not in runtimes:
        return
    try:
        check_micro()
    except HostError:
        if packed:
            raise
        return
    yield _Micro(file, network)


@dataclass(frozen=True)
class _File:
    """A file, and what was found out of it for every runtime: see ``IntegerRuntime.differing``."""

    content: bytes
    float_io: bool
    batch: int
    differing: tuple[str, ...]


class _TfliteRuntime(IntegerRuntime):
    """What the runtimes of TFLite share: int8 values, channels last, as many samples at a time as the file takes."""

    def __init__(self, file: _File, network: IntegerModel) -> None:
        self._network, self._float_io, self.differing = network, file.float_io, file.differing
        self._batch = file.batch

    def run(self, inputs: Inputs) -> IntegerRun:
        return IntegerRun({}, self.run_untouched(inputs))

    def _groups(self, inputs: Inputs) -> Iterator[Array]:
        """Samples as the file takes them, so many at once."""
        levels = to_grid(inputs, self._network.grids[INPUT]).astype(np.int16) - OFFSET
        samples = to_channels_last(inputs if self._float_io else levels.astype(np.int8))
        for (group,), _ in in_groups((samples,), self._batch):
            yield group

    def _levels(self, groups: Sequence[Array], name: str, count: int) -> Levels:
        """A value of the file as levels of so many samples, channels first."""
        values = np.concatenate(groups)
        if values.dtype == np.float32:
            levels = to_grid(values, self._network.grids[name])
        else:
            levels = (values.astype(np.int16) + OFFSET).astype(np.uint8)
        levels = to_channels_first(levels)
        shape = (len(groups) * self._batch, *self._network.shapes[name])
        return levels.reshape(shape)[:count] if levels.size == np.prod(shape) else levels


class _LiteRT(_TfliteRuntime):
    """LiteRT, with XNNPACK or with its own kernels; these keep every value."""

    def __init__(self, file: _File, network: IntegerModel, rounding: Rounding) -> None:
        super().__init__(file, network)
        xnnpack = rounding == "xnnpack"
        self.key, self.name, self.rounding = rounding, "LiteRT XNNPACK" if xnnpack else "LiteRT", rounding
        self._session = LiteRTSession(file.content, xnnpack=xnnpack)
        self._names = [] if xnnpack else [operation.output for operation in network.operations]
        self._traced: LiteRTSession | None = None
        if self._names:
            flat, _ = single_graph(file.content, None)
            indices = [flat.find(name) for name in self._names]
            if missing := [name for name, index in zip(self._names, indices, strict=True) if index is None]:
                raise InputError(f"the file has no value {missing[0]}; export it again with --kernel integer")
            flat.graph.outputs = np.array([*flat.graph.outputs, *indices], np.int32)
            flat.model.signatureDefs = None
            self._traced = LiteRTSession(flat.pack(), xnnpack=False)

    def run(self, inputs: Inputs) -> IntegerRun:
        outputs = self.run_untouched(inputs)
        if self._traced is None:
            return IntegerRun({}, outputs)
        parts = [self._traced.run_group(group) for group in self._groups(inputs)]
        # A value that is an output already is given once.
        columns = zip(*parts, strict=True)
        next(columns)
        values = {
            name: self._levels(column, name, len(inputs)) for name, column in zip(self._names, columns, strict=False)
        }
        return IntegerRun({INPUT: to_grid(inputs, self._network.grids[INPUT]), **values}, outputs)

    def run_untouched(self, inputs: Inputs) -> Levels:
        parts = [self._session.run_group(group)[0] for group in self._groups(inputs)]
        return self._levels(parts, self._network.output, len(inputs))


class _Micro(_TfliteRuntime):
    """TFLite Micro's interpreter."""

    key, name, rounding = "tflm", "TFLite Micro", "tflm"

    def __init__(self, file: _File, network: IntegerModel) -> None:
        super().__init__(file, network)
        self._session = MicroSession(file.content)

    def run_untouched(self, inputs: Inputs) -> Levels:
        parts = [self._session.run_group(group) for group in self._groups(inputs)]
        return self._levels(parts, self._network.output, len(inputs))


def _differing(flat: FlatModel, fresh: FlatModel) -> Iterator[str]:
    """Names of the tensors that a file has otherwise than a fresh export, by value, grid or the operator behind them.

    Tensors are told apart by their place, as operators do: several may have the same name.
    """
    tensors, operators = fresh.graph.tensors, fresh.graph.operators
    for index in range(len(tensors)):
        if index >= len(flat.graph.tensors) or not _same_tensor(flat, fresh, index):
            yield fresh.name(index)
    for number, operator in enumerate(operators):
        own = flat.graph.operators[number] if number < len(flat.graph.operators) else None
        if own is None or _meaning(flat, own) != _meaning(fresh, operator):
            yield fresh.name(int(operator.outputs[0]))
    for operator in flat.graph.operators[len(operators) :]:
        yield flat.name(int(operator.outputs[0]))
    for part, name in (("inputs", INPUT), ("outputs", "the outputs")):
        if list(getattr(flat.graph, part)) != list(getattr(fresh.graph, part)):
            yield name


def _same_tensor(flat: FlatModel, fresh: FlatModel, index: int) -> bool:
    """Whether two files have the same tensor in a place."""
    own, other = flat.tensor(index), fresh.tensor(index)
    return (
        flat.name(index) == fresh.name(index)
        and own.type == other.type
        and flat.shape(index) == fresh.shape(index)
        and _same_value(flat.constant(index), fresh.constant(index))
        and _same_grid(own.quantization, other.quantization)
    )


def _same_value(value: npt.NDArray[Any] | None, expected: npt.NDArray[Any] | None) -> bool:
    """Whether two tensors are the same constant, or both are computed."""
    if value is None or expected is None:
        return value is expected
    return np.array_equal(value, expected)


def _same_grid(own: Any, other: Any) -> bool:
    """Whether two tensors have the same scales and zero points, along the same axis."""
    if own is None or other is None:
        return own is other
    parts = ("scale", "zeroPoint", "quantizedDimension")
    return all(np.array_equal(getattr(own, part), getattr(other, part)) for part in parts)


def _meaning(flat: FlatModel, operator: Operator) -> tuple[object, ...]:
    """What an operator does to what."""
    options = operator.builtinOptions
    settings = {name: str(value) for name, value in vars(options).items()} if options is not None else {}
    return flat.operator_name(operator), list(operator.inputs), list(operator.outputs), type(options), settings
