"""Whether an integer file is the integer model: its codes, each layer to the last bit, and its outputs.

A layer is compared on the runtime's own input to it, so that one difference does not hide the next. Against PyTorch,
which adds floats in an order of its own, levels that differ are counted: *flips*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tqexport.errors import HostError, InputError
from tqexport.integer.arithmetic import Rounding
from tqexport.integer.build import integer_model
from tqexport.integer.grids import OFFSET
from tqexport.integer.halves import halves_of
from tqexport.integer.model import Convolution, IntegerModel
from tqexport.integer.naming import INPUT
from tqexport.integer.onnx_form import LEVELS
from tqexport.ort import open_session
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.model import TruncModel
from tqexport.verification.runtimes import to_channels_first, to_channels_last

__all__ = ["IntegerVerdict", "LayerDifference", "verify_integer_onnx", "verify_integer_tflite"]

Inputs = npt.NDArray[np.float32]
Levels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LayerDifference:
    """A layer whose levels are not those of the integer model, given the same input.

    Attributes:
        name: The value it computes.
        differing: How many levels differ.
        levels: How many there are.
        largest: By how many levels at most.
    """

    name: str
    differing: int
    levels: int
    largest: int


@dataclass(frozen=True)
class IntegerVerdict:
    """What became of a file in a runtime.

    Attributes:
        rounding: Of which runtime, see :mod:`tqexport.integer.arithmetic`.
        codes: Layers whose stored weights are not those of the network, by name.
        layers: Layers that differ. Layers that the runtime keeps to itself are not looked at.
        layers_compared: How many were looked at.
        outputs: How many levels of the untouched file's outputs differ from the integer model's.
        flips: How many levels of the outputs differ from PyTorch's, and of how many.
        agreement: Share of samples whose largest output is PyTorch's.
    """

    rounding: Rounding
    codes: tuple[str, ...]
    layers: tuple[LayerDifference, ...]
    layers_compared: int
    outputs: int
    flips: tuple[int, int]
    agreement: float

    @property
    def passed(self) -> bool:
        """Whether the file is the integer model, to the last bit. Flips are no failure."""
        return not self.codes and not self.layers and not self.outputs


def verify_integer_onnx(model: TruncModel, bits: int, content: bytes, inputs: Inputs) -> IntegerVerdict:
    """Compare an ONNX file with the integer model, in onnxruntime with its default optimisations.

    Args:
        model: The calibrated network.
        bits: The width of the file.
        content: A file of :func:`tqexport.integer.onnx_form.integer_onnx`.
        inputs: float32 (N, *input_shape), normalised.

    Raises:
        InputError: onnxruntime does not take the file, or it has other values than the network.
    """
    network = integer_model(model, bits)
    file = onnx.load_from_string(content)
    names = [operation.output for operation in network.operations]
    file.graph.output.extend(helper.make_tensor_value_info(name + LEVELS, TensorProto.UINT8, None) for name in names)
    traced = open_session(file.SerializeToString())
    values = dict(zip(names, traced.run([name + LEVELS for name in names], {INPUT: inputs}), strict=True))
    values[INPUT] = network.run(inputs[:1])[INPUT] if not len(inputs) else _input_levels(network, inputs)
    (outputs,) = open_session(content).run(None, {INPUT: inputs})
    stored = {tensor.name: tensor for tensor in file.graph.initializer}
    wrong = tuple(name for name, expected in _expected_onnx(network, stored) if not _equal(stored.get(name), expected))
    grid = network.grids[network.output]
    found = np.rint(outputs / np.float32(grid.scale)).astype(np.int64) + grid.zero_point
    return _verdict(model, network, "real", inputs, values, found, wrong)


def verify_integer_tflite(
    model: TruncModel, bits: int, content: bytes, inputs: Inputs, rounding: Rounding
) -> IntegerVerdict:
    """Compare a TFLite file with the integer model.

    Args:
        model: The calibrated network.
        bits: The width of the file.
        content: A file of :func:`tqexport.integer.tflite_form.integer_tflite`, int8 in and out.
        inputs: float32 (N, *input_shape), normalised.
        rounding: ``xnnpack`` or ``litert`` runs the file in LiteRT, ``tflm`` in TFLite Micro. Layers are looked at in
            LiteRT's own kernels alone, as the others do not keep values.

    Raises:
        InputError: The runtime does not take the file, or its input is not int8.
        HostError: TFLite Micro is not installed.
    """
    network, flat = integer_model(model, bits), FlatModel(content)
    start = _input_levels(network, inputs)
    samples = np.ascontiguousarray(to_channels_last(start.astype(np.int16) - OFFSET).astype(np.int8))
    keep = [operation.output for operation in network.operations] if rounding == "litert" else []
    run = _micro(content) if rounding == "tflm" else _litert(content, rounding == "xnnpack", keep)
    parts = [run(sample[None]) for sample in samples]
    read = {name: _from_file([part[name] for part in parts], network, name) for name in parts[0]}
    found = read.pop("")
    values = {**read, INPUT: start} if read else {}
    stored = {flat.name(index): index for index in range(len(flat.graph.tensors))}
    wrong = tuple(
        layer.name
        for layer in network.operations
        if isinstance(layer, Convolution) and not _same_filter(flat, stored.get(f"{layer.name}.weight"), layer)
    )
    return _verdict(model, network, rounding, inputs, values, found.astype(np.int64), wrong)


def _verdict(
    model: TruncModel,
    network: IntegerModel,
    rounding: Rounding,
    inputs: Inputs,
    values: Mapping[str, Levels],
    found: npt.NDArray[np.int64],
    wrong: tuple[str, ...],
) -> IntegerVerdict:
    layers = []
    compared = [op for op in network.operations if {op.output, *op.inputs} <= values.keys()]
    for operation in compared:
        expected = network.compute(operation, values, rounding).astype(np.int64)
        distance = np.abs(expected - values[operation.output])
        if distance.any():
            layers.append(
                LayerDifference(
                    operation.output, int(np.count_nonzero(distance)), int(distance.size), int(distance.max())
                )
            )
    expected = network.run(inputs, rounding)[network.output].astype(np.int64)
    with torch.no_grad(), model.at_width(network.bits) as reference:
        floats = reference(torch.from_numpy(inputs)).numpy()
    grid = network.grids[network.output]
    levels = np.rint(floats / np.float32(grid.scale)).astype(np.int64) + grid.zero_point
    same = found.reshape(len(found), -1).argmax(1) == levels.reshape(len(levels), -1).argmax(1)
    return IntegerVerdict(
        rounding,
        wrong,
        tuple(layers),
        len(compared),
        int((found != expected).sum()),
        (int((found != levels).sum()), int(levels.size)),
        float(same.mean()),
    )


def _input_levels(network: IntegerModel, inputs: Inputs) -> Levels:
    from tqexport.integer.arithmetic import to_grid

    return to_grid(inputs, network.grids[INPUT])


def _expected_onnx(
    network: IntegerModel, stored: Mapping[str, onnx.TensorProto]
) -> list[tuple[str, npt.NDArray[np.generic]]]:
    """What the file must store of each layer's weights."""
    expected: list[tuple[str, npt.NDArray[np.generic]]] = []
    for layer in network.operations:
        if not isinstance(layer, Convolution):
            continue
        name = f"{layer.name}.weight"
        if f"{name}.integers" in stored:
            weight = halves_of(layer).weight if layer.wide else layer.weight.astype(np.int8)
            expected.append((f"{name}.integers", weight))
        elif layer.codes is None:
            expected.append((f"{name}.unsigned", layer.unsigned.astype(np.int8)))
        else:
            expected += [(f"{name}.codes", layer.codes.codes), (f"{name}.shift", np.array(layer.codes.shift, np.uint8))]
    return expected


def _equal(tensor: onnx.TensorProto | None, expected: npt.NDArray[np.generic]) -> bool:
    if tensor is None:
        return False
    found = numpy_helper.to_array(tensor)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


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


def _from_file(parts: list[npt.NDArray[np.int8]], network: IntegerModel, name: str) -> Levels:
    levels = to_channels_first((np.concatenate(parts).astype(np.int16) + OFFSET).astype(np.uint8))
    return levels.reshape(len(levels), *network.shapes[name or network.output])


_Runner = Callable[[npt.NDArray[np.int8]], dict[str, npt.NDArray[np.int8]]]


def _litert(content: bytes, xnnpack: bool, keep: list[str]) -> _Runner:
    """A function from a sample to its outputs, named "", and the values to keep."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from tqexport.backends.tflite.litert import open_interpreter

    if xnnpack:
        interpreter: Any = open_interpreter(content)
    else:
        resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            interpreter = Interpreter(
                model_content=content,
                num_threads=1,
                experimental_op_resolver_type=resolver,
                experimental_preserve_all_tensors=True,
            )
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"LiteRT does not load the file: {error}") from error
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    if source["dtype"] is not np.int8:
        raise InputError("the file takes floats; the integer file that is compared takes int8")
    where = {detail["name"]: detail["index"] for detail in interpreter.get_tensor_details()} if keep else {}
    if missing := [name for name in keep if name not in where]:
        raise InputError(f"the file has no value {missing[0]}; export it again with --kernel integer")

    def run(sample: npt.NDArray[np.int8]) -> dict[str, npt.NDArray[np.int8]]:
        interpreter.set_tensor(source["index"], sample)
        interpreter.invoke()
        found = {"": interpreter.get_tensor(result["index"])}
        return found | {name: interpreter.get_tensor(where[name]) for name in keep}

    return run


def _micro(content: bytes) -> _Runner:
    try:
        from tflite_micro.python.tflite_micro import runtime  # type: ignore[import-untyped]
    except ImportError as error:
        raise HostError("TFLite Micro is not installed: pip install --pre tflite-micro") from error
    interpreter = runtime.Interpreter.from_bytes(content, arena_size=_ARENA)

    def run(sample: npt.NDArray[np.int8]) -> dict[str, npt.NDArray[np.int8]]:
        interpreter.set_input(sample, 0)
        interpreter.invoke()
        return {"": interpreter.get_output(0)}

    return run


_ARENA = 64 << 20  # bytes; more than any device has
