"""Running integer TFLite files for verification: in LiteRT with XNNPACK and without, and in TFLite Micro."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.grouping import in_groups
from tqexport.backends.tflite.file import single_graph
from tqexport.backends.tflite.layout import to_channels_first, to_channels_last
from tqexport.backends.tflite.micro import MicroSession, check_micro
from tqexport.backends.tflite.packing import DECODE, unpacked_filters
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.errors import HostError, InputError
from tqexport.integer.arithmetic import Rounding, to_grid
from tqexport.integer.grids import OFFSET
from tqexport.integer.model import IntegerModel
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
    flat, _ = single_graph(content, None)
    packed = any(flat.operator_name(operator) == DECODE for operator in flat.graph.operators)
    batch = next(iter(flat.shape(int(flat.graph.inputs[0]))), 1) if len(flat.graph.inputs) else 1
    if not 1 <= batch <= limits.BATCH:
        raise InputError(f"takes {batch} samples at once; tqexport writes files of 1 to {limits.BATCH}")
    float_io = any(flat.tensor(int(index)).type == schema.TensorType.FLOAT32 for index in flat.graph.inputs)
    file = _File(content, float_io, batch)
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
    """A file, whether it takes float32, and how many samples it takes at once."""

    content: bytes
    float_io: bool
    batch: int


class _TfliteRuntime(IntegerRuntime):
    """What the runtimes of TFLite share: int8 values, channels last, as many samples at a time as the file takes."""

    def __init__(self, file: _File, network: IntegerModel) -> None:
        self._network, self._float_io, self._batch = network, file.float_io, file.batch

    @property
    def batch(self) -> int:
        return self._batch

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
            if None not in indices:  # of a file of another structure nothing but the outputs is looked at
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
