"""Putting the codes back into a float TFLite file, and reading them from there.

The converter knows float32 weights alone, and it may fold a BatchNorm or an activation scale next to a layer into its
filter. That multiplies whole output channels, ``filter[o] = gain[o] * weight[o]``, so the stored integers come back
exactly: the file then holds them as int8 in front of a DEQUANTIZE that carries the gain.

A weight ``alpha * u_b + beta`` is written ``scale * (q + k)`` with q in int8. Below 8 bits q is the odd integer
``2 u_b - M_b`` and k = 0. At 8 bits odd integers do not fit: q = u - 128 and k = 1/2. A constant k other than 0 (bias
correction has one too) is computed exactly by one more input channel:
``conv(x, q + k) = conv([x, k * sum(x)], [q, 1])``.

A depthwise or grouped convolution has no room for that. At 8 bits its filter is the odd integers ``2 q + 1``, exact in
float16, and their scale is applied to its result: as many bytes as int8 and a second filter for k, half the time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from tqexport.artifacts.manifest import Kernel
from tqexport.backends.onnx.file import CodedWeight
from tqexport.backends.tflite.flatbuffer import FlatModel, Operator, type_code
from tqexport.errors import ConversionError
from tqexport.truncation import STORED_BITS, max_code

__all__ = ["TO_TORCH", "filters", "integer_codes", "integers_of", "put_codes_back", "stored_integers"]

# Where a filter's axes go to reach PyTorch's order, output channels first; and the axis of its output channels.
TO_TORCH = {"CONV_2D": (0, 3, 1, 2), "DEPTHWISE_CONV_2D": (3, 0, 1, 2), "FULLY_CONNECTED": (0, 1)}
_CHANNEL_AXIS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
_FIT = 2e-6  # of a channel's largest weight: float32 rounding of two products. Half a step at 8 bits is 2e-3.


@dataclass(frozen=True)
class _Match:
    """A filter of the file that is ``gain * weight``."""

    filter: int
    operator: str
    weight: CodedWeight
    gain: npt.NDArray[np.float64]  # per output channel


def integer_codes(shifted: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int8]:
    """The int8 value that stands for each code: ``2 u_b - M_b`` below 8 bits, ``u - 128`` at 8 (same shape)."""
    wide = shifted.astype(np.int16)
    return (wide - 128 if bits == STORED_BITS else 2 * wide - max_code(bits)).astype(np.int8)


def put_codes_back(flat: FlatModel, weights: Sequence[CodedWeight], kernel: Kernel = "exact") -> None:
    """Replace the float filter of every quantised layer by its stored integers.

    Args:
        flat: The file as the converter wrote it; changed in place.
        weights: The quantised layers of the network.
        kernel: ``exact``: the integers are de-quantised, once, for the float kernels. ``dynamic``: the kernels multiply
            with the integers themselves and round their input to 8 bits as they run; depthwise and grouped
            convolutions stay exact.

    Raises:
        ConversionError: A layer's weights are not found in the file; it names the layer.
    """
    matches = _match(flat, weights)
    found = {match.weight.name for match in matches}
    if missing := [weight.layer for weight in weights if weight.name not in found]:
        raise ConversionError(
            f"after conversion the weights of layer {missing[0]} are not recognisable in the TFLite file "
            f"({len(missing)} of {len(weights)} layers); keep the layer in float or report its operators"
        )
    for match in matches:
        _replace(flat, match, kernel)


def integers_of(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """q of a stored filter, same shape: int8 as it is, or float32 from the odd integers of a float16 one."""
    return (stored.astype(np.float32) - 1) / 2 if stored.dtype == np.float16 else stored


def stored_integers(flat: FlatModel) -> dict[str, list[npt.NDArray[Any]]]:
    """The integers q of a file's filters by weight name, in PyTorch's axis order with output channels first.

    They are int8, or float32 where the file has float16. A filter may hold further input channels behind those of the
    layer (see the module's text).
    """
    found: dict[str, list[npt.NDArray[Any]]] = {}
    seen: set[int] = set()
    dequantized = {
        int(operator.outputs[0]): int(operator.inputs[0])
        for operator in flat.graph.operators
        if flat.operator_name(operator) == "DEQUANTIZE"
    }
    for operator in flat.graph.operators:
        kind = flat.operator_name(operator)
        if kind not in TO_TORCH:
            continue
        codes = dequantized.get(int(operator.inputs[1]), int(operator.inputs[1]))
        value = flat.constant(codes)
        if value is not None and value.dtype in (np.int8, np.float16) and codes not in seen:
            seen.add(codes)
            integers = integers_of(value).transpose(TO_TORCH[kind])
            found.setdefault(flat.name(codes).removesuffix(".codes"), []).append(integers)
    return found


def _match(flat: FlatModel, weights: Sequence[CodedWeight]) -> list[_Match]:
    """Find the layer behind each constant filter of the file."""
    expected = [(weight, weight.dequantized()) for weight in weights]
    matches: list[_Match] = []
    for index, kind in filters(flat).items():
        value = flat.constant(index)
        if value is None or value.dtype != np.float32:
            continue
        torch_order = value.transpose(TO_TORCH[kind])
        for weight, dequantized in expected:
            gain = _gain(torch_order, dequantized)
            if gain is not None:
                matches.append(_Match(index, kind, weight, gain))
                break
    return matches


def filters(flat: FlatModel) -> dict[int, str]:
    """The filter tensors of the weighted operators, with the operator's kind."""
    return {
        int(operator.inputs[1]): kind
        for operator in flat.graph.operators
        if (kind := flat.operator_name(operator)) in TO_TORCH
    }


def _gain(filter_: npt.NDArray[np.float32], weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """``gain`` with ``filter_ == gain[:, None] * weight`` up to float32 rounding, or None if there is none."""
    if filter_.shape[0] != weight.shape[0] or filter_.size != weight.size:
        return None
    rows, reference = filter_.reshape(len(filter_), -1), weight.reshape(len(weight), -1)
    if not _fits(rows[:1], reference[:1]):  # most candidates end here
        return None
    return _ratio(rows, reference) if _fits(rows, reference) else None


def _ratio(rows: npt.NDArray[np.float32], reference: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    squares: npt.NDArray[np.float64] = (reference**2).sum(1)
    products: npt.NDArray[np.float64] = (rows * reference).sum(1)
    return products / squares


def _fits(rows: npt.NDArray[np.float32], reference: npt.NDArray[np.float64]) -> bool:
    error = np.abs(rows - _ratio(rows, reference)[:, None] * reference).max(1)
    return bool((error <= _FIT * np.abs(rows).max(1)).all())


def _replace(flat: FlatModel, match: _Match, kernel: Kernel = "exact") -> None:
    """Put int8 integers in the place of a float filter, behind a DEQUANTIZE where the kernel is a float one."""
    weight, negative = match.weight, match.gain < 0
    integers, scale, constant = _integer_form(weight)
    integers = integers.reshape(len(integers), -1)
    # A channel with a negative gain keeps a positive scale and has its integers turned round; ~q stays in int8.
    if weight.bits == STORED_BITS:
        integers = np.where(negative[:, None], ~integers, integers)
        constants = np.where(negative, 1 - constant, constant)
    else:
        integers = np.where(negative[:, None], -integers, integers)
        constants = np.where(negative, -constant, constant)
    # A gain of 0 has no ratio; the codes stay, and the smallest harmless scale makes them vanish.
    scales = np.where(match.gain == 0, 1e-30, np.abs(match.gain) * scale).astype(np.float32)

    torch_shape = [int(flat.tensor(match.filter).shape[axis]) for axis in TO_TORCH[match.operator]]
    stored = integers.reshape(torch_shape)
    readers = flat.consumers(match.filter)
    over_all_channels = all(_channels(flat, reader) == torch_shape[1] for reader in readers)
    in_integers = kernel == "dynamic" and over_all_channels
    if not over_all_channels and (constants == 0.5).all() and _scalable(flat, readers, scales):
        odd = (2 * stored.astype(np.int16) + 1).astype(np.float16)
        _store_dequantized(flat, match.filter, match.operator, weight.name, odd, None)
        for reader in readers:
            _scale_result(flat, reader, scales * np.float32(0.5), weight.name)
        return
    if constants.any():
        if over_all_channels and not in_integers:
            for value in np.unique(constants[constants != 0]):
                column = (constants == value).astype(np.int8).reshape(-1, *[1] * (stored.ndim - 1))
                stored = np.concatenate([stored, np.broadcast_to(column, (len(stored), 1, *stored.shape[2:]))], axis=1)
            for reader in readers:
                _widen_input(flat, reader, np.unique(constants[constants != 0]))
        else:
            # Rounded to 8 bits, a sum among the input's channels would take their precision; it stays float.
            shape = (torch_shape[0], 1, *torch_shape[2:]) if in_integers else tuple(torch_shape)
            signs = np.sign(constants).astype(np.int8).reshape(-1, *[1] * (stored.ndim - 1))
            ones = np.ones(shape, np.int8) * signs
            for reader in readers:
                source = _channel_sum(flat, reader) if in_integers else int(reader.inputs[0])
                _add_constant_part(flat, reader, source, match, ones, scales * np.abs(constants).astype(np.float32))
    if in_integers:
        _store(flat, match.filter, match.operator, weight.name, stored, scales)
    else:
        _store_dequantized(flat, match.filter, match.operator, weight.name, stored, scales)


def _integer_form(weight: CodedWeight) -> tuple[npt.NDArray[np.int8], float, float]:
    """q, scale and k with ``weight = scale * (q + k)``."""
    integers = integer_codes(weight.shifted(), weight.bits)
    scale, middle = (
        (weight.scale, 128.0) if weight.bits == STORED_BITS else (weight.scale / 2, max_code(weight.bits) / 2)
    )
    constant = (weight.offset + weight.scale * middle) / scale
    exact = 0.5 if weight.bits == STORED_BITS else 0.0
    # Without bias correction k is exact; what differs is the rounding of scale and offset to float32.
    return integers, scale, exact if abs(constant - exact) * scale <= _FIT * abs(weight.offset) else constant


def _scalable(flat: FlatModel, readers: Sequence[Operator], scales: npt.NDArray[np.float32]) -> bool:
    """Whether biases may be divided by the scales; a gain of all but 0 would make them overflow."""
    biases = [flat.constant(int(reader.inputs[2])) for reader in readers if _has_bias(reader)]
    with np.errstate(over="ignore"):
        return all(bias is not None and bool((np.abs(bias / scales) < 1e18).all()) for bias in biases)


def _has_bias(reader: Operator) -> bool:
    return len(reader.inputs) > 2 and int(reader.inputs[2]) >= 0


def _scale_result(flat: FlatModel, reader: Operator, scales: npt.NDArray[np.float32], name: str) -> None:
    """Multiply an operator's result, without its activation function, by a scale per output channel."""
    output = int(reader.outputs[0])
    unscaled = flat.add_like(f"{flat.name(output)}/unscaled", output, len(scales))
    if _has_bias(reader):
        bias = flat.constant(int(reader.inputs[2]))
        assert bias is not None  # _scalable
        divided = flat.add_constant(f"{name}/unscaled_bias", (bias / scales).astype(np.float32))
        reader.inputs = np.array([*reader.inputs[:2], divided], np.int32)
    options = schema.MulOptionsT()
    options.fusedActivationFunction = reader.builtinOptions.fusedActivationFunction
    reader.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
    reader.outputs = np.array([unscaled], np.int32)
    factor = flat.add_constant(f"{name}/scale", scales)
    flat.insert_after(reader, [flat.operator("MUL", [unscaled, factor], output, options)])


def _channels(flat: FlatModel, operator: Operator) -> int:
    """Input channels of an operator; 0 where its filter does not run over all of them."""
    return 0 if flat.operator_name(operator) == "DEPTHWISE_CONV_2D" else int(flat.tensor(operator.inputs[0]).shape[-1])


def _store_dequantized(
    flat: FlatModel,
    target: int,
    kind: str,
    name: str,
    stored: npt.NDArray[Any],
    scales: npt.NDArray[np.float32] | None,
) -> None:
    """Make tensor ``target`` a float32 one that is de-quantised from ``stored``; see :func:`_store`."""
    codes = flat.add_tensor(name, ())
    _store(flat, codes, kind, name, stored, scales)
    tensor = flat.tensor(target)
    tensor.name, tensor.shape, tensor.buffer = name, flat.tensor(codes).shape, 0
    operator = flat.operator("DEQUANTIZE", [codes], target, schema.DequantizeOptionsT(), version=5)
    flat.graph.operators.insert(0, operator)


def _store(
    flat: FlatModel,
    target: int,
    kind: str,
    name: str,
    stored: npt.NDArray[Any],
    scales: npt.NDArray[np.float32] | None,
) -> None:
    """Make tensor ``target`` the constant ``NAME.codes``.

    Args:
        stored: In PyTorch's axis order, int8 or float16.
        scales: Of int8, per output channel.
    """
    value = np.ascontiguousarray(stored.transpose(np.argsort(TO_TORCH[kind])))
    tensor = flat.tensor(target)
    tensor.name, tensor.shape, tensor.type = f"{name}.codes", np.array(value.shape, np.int32), type_code(value.dtype)
    flat.set_constant(target, value)
    if scales is None:
        return
    if np.ptp(scales) <= 1e-7 * scales.max():
        scales = scales[:1]  # each scale costs 12 bytes in the file
    quantization = schema.QuantizationParametersT()
    quantization.scale, quantization.zeroPoint = scales, np.zeros(len(scales), np.int64)
    quantization.quantizedDimension = _CHANNEL_AXIS[kind]
    tensor.quantization = quantization


def _widen_input(flat: FlatModel, reader: Operator, multiples: npt.NDArray[np.float64]) -> None:
    """Append ``k * sum over channels`` to an operator's input, once for each k; readers of one input share it."""
    source = int(reader.inputs[0])
    name = f"{flat.name(source)}/with_sum_{'_'.join(f'{value:.9g}' for value in multiples)}"
    widened = next((i for i, tensor in enumerate(flat.graph.tensors) if tensor.name == name), None)
    if widened is None:
        total = _channel_sum(flat, reader)
        operators, parts = [], [source]
        for value in multiples:
            parts.append(flat.add_like(f"{flat.name(source)}/{value:.9g}_sum", source, 1))
            factor = flat.add_constant(f"{value:.9g}", np.array([value], np.float32))
            operators.append(flat.operator("MUL", [total, factor], parts[-1], schema.MulOptionsT()))
        widened = flat.add_like(name, source, int(flat.tensor(source).shape[-1]) + len(multiples))
        concatenation = schema.ConcatenationOptionsT()
        concatenation.axis = len(flat.tensor(source).shape) - 1
        operators.append(flat.operator("CONCATENATION", parts, widened, concatenation))
        flat.insert_before(reader, operators)
    reader.inputs = np.array([widened, *reader.inputs[1:]], np.int32)


def _channel_sum(flat: FlatModel, reader: Operator) -> int:
    """The sum over the channels of an operator's input; readers of one input share it."""
    source = int(reader.inputs[0])
    name = f"{flat.name(source)}/sum"
    total = next((i for i, tensor in enumerate(flat.graph.tensors) if tensor.name == name), None)
    if total is None:
        total = flat.add_like(name, source, 1)
        axis = flat.add_constant("last_axis", np.array([len(flat.tensor(source).shape) - 1], np.int32))
        reducer = schema.ReducerOptionsT()
        reducer.keepDims = True
        flat.insert_before(reader, [flat.operator("SUM", [source, axis], total, reducer)])
    return total


def _add_constant_part(
    flat: FlatModel,
    reader: Operator,
    source: int,
    match: _Match,
    ones: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
) -> None:
    """Add ``conv(source, k)`` to an operator's result, with an operator of its own over ``ones``."""
    output, name = int(reader.outputs[0]), f"{match.weight.name}/constant"
    filter_ = flat.add_tensor(name, ())
    _store_dequantized(flat, filter_, match.operator, name, ones, np.maximum(scales, 1e-30))
    main, constant = (flat.add_like(f"{flat.name(output)}/{part}", output, len(ones)) for part in ("main", "constant"))
    second = copy.copy(reader)
    no_bias = flat.add_constant(f"{match.weight.name}/no_bias", np.zeros(len(scales), np.float32))
    second.inputs = np.array([source, filter_, no_bias], np.int32)
    second.outputs = np.array([constant], np.int32)
    addition = schema.AddOptionsT()
    addition.fusedActivationFunction = reader.builtinOptions.fusedActivationFunction
    reader.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
    reader.outputs = np.array([main], np.int32)
    flat.insert_after(reader, [second, flat.operator("ADD", [main, constant], output, addition)])
