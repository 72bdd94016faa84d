"""Running integer TFLite files for verification: in LiteRT with XNNPACK and without, and in TFLite Micro."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.tflite.file import single_graph
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.layout import to_channels_first, to_channels_last
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.errors import InputError
from tqexport.integer.arithmetic import Rounding, to_grid
from tqexport.integer.grids import OFFSET
from tqexport.integer.halves import halves_of
from tqexport.integer.model import Convolution, IntegerModel
from tqexport.integer.naming import INPUT
from tqexport.integer.runtime import IntegerRun, IntegerRuntime, Levels

__all__ = ["open_integer_runtimes"]

Inputs = npt.NDArray[np.float32]

_MICRO = "tflite_micro"
_ARENA = 64 << 20  # bytes; more than any device has


def open_integer_runtimes(content: bytes, network: IntegerModel) -> Iterator[IntegerRuntime]:
    """A file in every runtime that is here; TFLite Micro is an extra.

    Raises:
        InputError: A runtime does not take it, or it is another network.
    """
    yield _LiteRT(content, network, "xnnpack")
    yield _LiteRT(content, network, "litert")
    if importlib.util.find_spec(_MICRO):
        yield _Micro(content, network)


class _TfliteRuntime(IntegerRuntime):
    """What the runtimes of TFLite share: int8 values, channels last, one sample at a time."""

    def __init__(self, content: bytes, network: IntegerModel) -> None:
        flat, _ = single_graph(content, None)
        stored = {flat.name(index): index for index in range(len(flat.graph.tensors))}
        self._network = network
        self.differing_weights = tuple(
            layer.name
            for layer in network.operations
            if isinstance(layer, Convolution) and not _same_filter(flat, stored.get(f"{layer.name}.weight"), layer)
        )

    def run(self, inputs: Inputs) -> IntegerRun:
        return IntegerRun({}, self.run_untouched(inputs))

    def _samples(self, inputs: Inputs) -> Sequence[npt.NDArray[np.int8]]:
        """Samples as the file takes them."""
        levels = to_grid(inputs, self._network.grids[INPUT]).astype(np.int16) - OFFSET
        samples: npt.NDArray[np.int8] = np.ascontiguousarray(to_channels_last(levels).astype(np.int8))
        return list(samples)

    def _levels(self, parts: Sequence[npt.NDArray[np.int8]], name: str) -> Levels:
        """A value of the file as levels, channels first."""
        levels = to_channels_first((np.concatenate(parts).astype(np.int16) + OFFSET).astype(np.uint8))
        return levels.reshape(len(levels), *self._network.shapes[name])


class _LiteRT(_TfliteRuntime):
    """LiteRT, with XNNPACK or with its own kernels; these keep every value."""

    def __init__(self, content: bytes, network: IntegerModel, rounding: Rounding) -> None:
        super().__init__(content, network)
        xnnpack = rounding == "xnnpack"
        self.name, self.rounding = "LiteRT XNNPACK" if xnnpack else "LiteRT", rounding
        self._session = LiteRTSession(content, xnnpack=xnnpack)
        self._names = [] if xnnpack else [operation.output for operation in network.operations]
        self._traced: LiteRTSession | None = None
        if self._names:
            flat, _ = single_graph(content, None)
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
        parts = [self._traced.run_sample(sample) for sample in self._samples(inputs)]
        # A value that is an output already is given once.
        columns = zip(*parts, strict=True)
        next(columns)
        values = {name: self._levels(column, name) for name, column in zip(self._names, columns, strict=False)}
        return IntegerRun({INPUT: to_grid(inputs, self._network.grids[INPUT]), **values}, outputs)

    def run_untouched(self, inputs: Inputs) -> Levels:
        parts = [self._session.run_sample(sample)[0] for sample in self._samples(inputs)]
        return self._levels(parts, self._network.output)


class _Micro(_TfliteRuntime):
    """TFLite Micro's interpreter."""

    def __init__(self, content: bytes, network: IntegerModel) -> None:
        super().__init__(content, network)
        from tflite_micro.python.tflite_micro import runtime

        self.name, self.rounding = "TFLite Micro", "tflm"
        self._interpreter: Any = runtime.Interpreter.from_bytes(content, arena_size=_ARENA)

    def run_untouched(self, inputs: Inputs) -> Levels:
        parts = []
        for sample in self._samples(inputs):
            self._interpreter.set_input(sample[None], 0)
            self._interpreter.invoke()
            parts.append(self._interpreter.get_output(0))
        return self._levels(parts, self._network.output)


def _same_filter(flat: FlatModel, index: int | None, layer: Convolution) -> bool:
    """Whether a file's filter is the layer's, in TFLite's order of axes."""
    stored = None if index is None else flat.constant(index)
    if stored is None:
        return False
    weight = halves_of(layer).weight if layer.wide else layer.weight.astype(np.int8)
    if layer.window is None:
        return bool(np.array_equal(stored, weight))
    if layer.wide and layer.groups > 1:
        weight = weight.reshape(*weight.shape[:-2], -1)
    weight = weight.reshape(*weight.shape[:2], *([1] if weight.ndim == 3 else []), *weight.shape[2:])
    depthwise = stored.shape[0] == 1 and stored.shape[-1] == weight.shape[0] and layer.groups > 1
    return bool(np.array_equal(stored, weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1)))
