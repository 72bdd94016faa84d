"""From a calibrated network to its integer model at a width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from tqexport.errors import ConversionError, InputError
from tqexport.integer.capture import Call, capture_calls, norm_of
from tqexport.integer.grids import HIGHEST, Grid, grids_of
from tqexport.integer.model import (
    Add,
    Average,
    Concat,
    Convolution,
    IntegerModel,
    Maximum,
    Operation,
    Requantize,
    Reshape,
    Window,
)
from tqexport.integer.naming import INPUT
from tqexport.integer.plan import Plan, Step, plan_of
from tqexport.integer.weights import LARGEST, IntegerWeight, integer_weight
from tqexport.model import TruncModel
from tqexport.truncation import max_code

__all__ = ["integer_model"]

Floats = npt.NDArray[np.float64]
_MOST_BIAS = 1 << 30


def integer_model(model: TruncModel, bits: int) -> IntegerModel:
    """The integer model of a network at a width.

    Args:
        model: A calibrated network, see :func:`tqexport.integer.calibration.calibrate`.
        bits: The weight width.

    Raises:
        InputError: The checkpoint lacks the width, or a value has no grid.
        ConversionError: An operation has no integer form.
    """
    with model.at_width(bits) as network:
        plan = plan_of(capture_calls(network, model.info.input_shape))
        grids = grids_of(network)
        named = {} if grids is None else grids.at(bits)
        if missing := [name for name in plan.grids if name not in named]:
            raise InputError(f"{missing[0]} has no grid to be an integer on; tqexport calibrate finds one from samples")
        return _Builder(plan, named, bits, model.info.input_shape).build()


class _Builder:
    def __init__(self, plan: Plan, named: Mapping[str, Grid], bits: int, input_shape: tuple[int, ...]) -> None:
        self._plan, self._named, self._bits = plan, named, bits
        self._grids = {INPUT: named[INPUT]}
        self._shapes = {INPUT: input_shape}
        self._operations: list[Operation] = []

    def build(self) -> IntegerModel:
        for step in self._plan.steps:
            self._shapes[step.output] = step.call.shape
            self._grids[step.output] = self._grid(step)
            self._operations.append(self._operation(step))
        operations = tuple(self._operations)
        quantized = frozenset(step.output for step in self._plan.steps if step.grid is None and not step.keeps_levels)
        return IntegerModel(self._bits, operations, self._grids, self._shapes, self._plan.output, quantized)

    def _grid(self, step: Step) -> Grid:
        if step.keeps_levels:
            return self._grids[step.inputs[0]]
        if step.grid is not None:
            named = self._named[step.grid]
            # What a ReLU or a clamp gives is never negative, wherever the grid has its zero.
            return replace(named, low=named.zero_point) if step.rounding is not None else named
        assert step.rounding is not None
        highest = max_code(int(getattr(step.rounding.module, "bits")))  # noqa: B009 - modules are typed without it
        return Grid(float(np.float32(1 / highest)), high=highest)

    def _operation(self, step: Step) -> Operation:
        """One step as an operation of the model."""
        name, inputs, output, call = step.call.name, step.inputs, step.output, step.call
        match call.kind:
            case "conv" | "linear":
                return self._convolution(step)
            case "batch_norm":
                return self._norm(step)
            case "average_pool":
                return self._pool(step)
            case "add":
                return Add(name, inputs, output)
            case "cat":
                return Concat(name, tuple(self._moved(name, source, output) for source in inputs), output)
            case "mean":
                return Average(name, inputs, output, bool(call.options["keep"]))
            case "max_pool":
                return Maximum(name, inputs, output, _pool_window(call, len(self._shapes[inputs[0]]) - 1))
            case "reshape":
                return Reshape(name, inputs, output)
        return Requantize(name, inputs, output)

    def _moved(self, name: str, source: str, output: str) -> str:
        """A value on the grid of another one."""
        if self._grids[source].same_levels == self._grids[output].same_levels:
            return source
        moved = f"{name}/{source}"
        if moved in self._grids:
            return moved  # the same value twice
        self._grids[moved], self._shapes[moved] = self._grids[output], self._shapes[source]
        self._operations.append(Requantize(moved, (source,), moved))
        return moved

    def _convolution(self, step: Step) -> Convolution:
        """A convolution or linear layer, with the BatchNorm that it takes along."""
        layer = step.call.module
        assert layer is not None
        weight = integer_weight(step.call.name, layer, self._bits)
        bias = _tensor(layer.bias) if layer.bias is not None else np.zeros(len(weight.scale))
        gain = np.ones(len(weight.scale))
        if step.norm is not None:
            gain, shift = _gain_and_shift(step.norm.module)
            bias = bias * gain + shift
        window, groups = None, 1
        if step.call.kind == "conv":
            assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
            window, groups = _conv_window(step.call.name, layer), layer.groups
        elif len(step.call.shape) != 1:
            raise ConversionError(
                f"{step.call.name} works on more than one vector per sample; it has no integer form yet"
            )
        return self._folded(step, weight, gain, bias, window, groups)

    def _norm(self, step: Step) -> Convolution:
        """A BatchNorm that follows no layer: a convolution of one element for each channel."""
        gain, shift = _gain_and_shift(step.call.module)
        rank = len(step.call.shape) - 1
        ones = (1,) * rank
        weight = IntegerWeight(np.full((len(gain), 1, *ones), LARGEST, np.int16), np.full(len(gain), 1 / LARGEST))
        return self._folded(step, weight, gain, shift, Window(ones, ones, ((0, 0),) * rank, ones), len(gain))

    def _pool(self, step: Step) -> Convolution:
        """An average over windows: a convolution with the same weight everywhere."""
        channels = self._shapes[step.inputs[0]][0]
        window = _pool_window(step.call, len(step.call.shape) - 1)
        options = step.call.options
        if any(any(pair) for pair in window.padding) and not options.get("count_include_pad", True):
            raise ConversionError(f"{step.call.name} does not count its padding; it has no integer form yet")
        count = options.get("divisor_override") or int(np.prod(window.kernel))
        values = np.ones((channels, 1, *window.kernel), np.int16)
        weight = IntegerWeight(values, np.full(channels, 1 / count))
        return self._folded(step, weight, np.ones(channels), np.zeros(channels), window, channels)

    def _folded(
        self, step: Step, weight: IntegerWeight, gain: Floats, bias: Floats, window: Window | None, groups: int
    ) -> Convolution:
        """Gain and bias in integers; a channel whose weights cannot show beside its bias is all bias."""
        source, target = self._grids[step.inputs[0]], self._grids[step.output]
        signs = np.sign(gain).astype(np.int8)
        scale = weight.scale * np.where(gain == 0, 1.0, np.abs(gain))
        most = np.abs(weight.values.astype(np.float64)).reshape(len(scale), -1).sum(1) * HIGHEST * source.scale
        huge = np.abs(bias) > _MOST_BIAS * source.scale * scale
        if (huge & (most * scale > target.scale / 64)).any():
            channel = int(np.flatnonzero(huge & (most * scale > target.scale / 64))[0])
            raise ConversionError(f"the bias of {step.call.name}, channel {channel}, is too large beside its weights")
        signs[huge] = 0
        scale = np.where(huge | (signs == 0), np.maximum(np.abs(bias) / (1 << 20) / source.scale, 1e-20), scale)
        scale32 = scale.astype(np.float32)
        unit = np.float64(np.float32(source.scale)) * scale32.astype(np.float64)
        whole = np.rint(bias / unit)
        if (most / source.scale + np.abs(whole)).max() > np.iinfo(np.int32).max:
            raise ConversionError(f"sums of {step.call.name} may exceed 32 bits; it has no integer form")
        return Convolution(
            step.call.name,
            step.inputs,
            step.output,
            weight.values,
            scale32,
            whole.astype(np.int32),
            window,
            groups,
            weight.codes,
            signs,
        )


def _gain_and_shift(norm: nn.Module | None) -> tuple[Floats, Floats]:
    """A BatchNorm in evaluation as ``gain * x + shift``, float64 per channel."""
    live = norm_of(norm)
    mean, variance = _tensor(live.running_mean), _tensor(live.running_var)
    gain = _tensor(live.weight) if live.weight is not None else np.ones_like(mean)
    shift = _tensor(live.bias) if live.bias is not None else np.zeros_like(mean)
    gain = gain / np.sqrt(variance + live.eps)
    return gain, shift - mean * gain


def _tensor(value: Any) -> Floats:
    return np.asarray(value.detach().double().numpy())


def _conv_window(name: str, layer: nn.Conv1d | nn.Conv2d) -> Window:
    """The window of a convolution."""
    if layer.padding_mode != "zeros":
        raise ConversionError(f"{name} pads with {layer.padding_mode}; only zeros have an integer form")
    kernel, stride, dilation = tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation)
    if layer.padding == "valid":
        padding: tuple[tuple[int, int], ...] = ((0, 0),) * len(kernel)
    elif layer.padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        padding = tuple((int(size), int(size)) for size in layer.padding)
    return Window(kernel, stride, padding, dilation)


def _pool_window(call: Call, rank: int) -> Window:
    """The window of a pool."""
    options = call.options
    if options.get("ceil_mode") or options.get("return_indices"):
        raise ConversionError(f"{call.name} uses ceil_mode or return_indices, which have no integer form yet")

    def per_axis(value: Any) -> tuple[int, ...]:
        return tuple(int(item) for item in value) if isinstance(value, (tuple, list)) else (int(value),) * rank

    kernel = per_axis(options["kernel_size"])
    stride = per_axis(options.get("stride") or kernel)
    padding = tuple((size, size) for size in per_axis(options.get("padding", 0)))
    return Window(kernel, stride, padding, per_axis(options.get("dilation", 1)))
