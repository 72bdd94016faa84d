"""Running exported files in onnxruntime and LiteRT, as deployed or unoptimised, with a look inside."""

from __future__ import annotations

import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.onnx.file import OUTPUT_NAME
from tqexport.backends.onnx.session import open_session
from tqexport.backends.tflite.codes import TO_TORCH, stored_integers
from tqexport.backends.tflite.file import CHANNELS_FIRST, METADATA_NAME
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.session import open_interpreter
from tqexport.errors import ConversionError, InputError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Runner",
    "RuntimeRun",
    "open_runner",
    "run_onnx",
    "run_tflite",
    "single_graph",
    "to_channels_first",
    "to_channels_last",
]

Array = npt.NDArray[Any]
_BATCH = 64
_LATENCY_RUNS, _LATENCY_SECONDS = 30, 1.0


@dataclass(frozen=True)
class RuntimeRun:
    """What a runtime computed for N samples.

    Attributes:
        runtime: Its name, for people.
        codes: By weight name, each place where the file holds it: uint8 codes that the runtime shifted, or the int8
            integers that a fixed TFLite file stores, output channels first.
        activations: By ``<module>/Round``: whole-number levels 0 to ``M_a``, float32 (N, ...) channels first.
        values: Outputs of layers and what else was kept, by name in the file, float32 (N, ...) channels first. ONNX
            files name them after the modules. Empty for a file as deployed, which fuses layers.
        traced_outputs: float32 (N, ...), of the run that also gave the activations.
        outputs: float32 (N, ...), of the untouched file.
    """

    runtime: str
    codes: Mapping[str, list[Array]]
    activations: Mapping[str, Array]
    values: Mapping[str, Array]
    traced_outputs: Array
    outputs: Array


class Runner(ABC):
    """One artifact at one width, open in its runtime on one thread."""

    @abstractmethod
    def run(self, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
        """Run samples.

        Args:
            inputs: float32 (N, ...) channels first; turned to channels last where the file wants it.

        Raises:
            InputError: The runtime does not run the file on them.
        """

    @abstractmethod
    def _run_untouched(self, sample: npt.NDArray[np.float32]) -> Array:
        """Outputs of the file as it is."""

    def latency(self, sample: npt.NDArray[np.float32]) -> float:
        """Median seconds that one sample takes, (1, ...) channels first, after one run to warm up."""
        self._run_untouched(sample)
        taken: list[float] = []
        while len(taken) < _LATENCY_RUNS and sum(taken) < _LATENCY_SECONDS:
            start = time.perf_counter()
            self._run_untouched(sample)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)


def open_runner(content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner:
    """Open an artifact of tqexport.

    Args:
        content: An ONNX or TFLite file.
        bits: The width to run a run-time file at; None for a fixed file.
        deployed: With the optimisations that the runtime makes by default, or XNNPACK. Otherwise without, and with the
            output of every layer kept.

    Raises:
        InputError: The runtime does not take the file, or the file lacks the width.
    """
    return (_LiteRT if content[4:8] == b"TFL3" else _OnnxRuntime)(content, bits, deployed)


def run_onnx(content: bytes, inputs: npt.NDArray[np.float32], bits: int | None = None) -> RuntimeRun:
    """Run an ONNX file in onnxruntime as deployed; see :func:`open_runner` and :meth:`Runner.run`."""
    return _OnnxRuntime(content, bits, deployed=True).run(inputs)


def run_tflite(content: bytes, inputs: npt.NDArray[np.float32], bits: int | None = None) -> RuntimeRun:
    """Run a TFLite file in LiteRT as deployed; see :func:`open_runner` and :meth:`Runner.run`."""
    return _LiteRT(content, bits, deployed=True).run(inputs)


class _OnnxRuntime(Runner):
    def __init__(self, content: bytes, bits: int | None, deployed: bool) -> None:
        import onnx

        from tqexport.backends.onnx.file import activation_outputs

        self._deployed = deployed
        model = onnx.load_from_string(content)
        self._weights = {
            node.output[0]: node.input[0].removesuffix(".codes")
            for node in model.graph.node
            if node.op_type == "BitShift"
        }
        self._activations = activation_outputs(model)
        self._values = [] if deployed else _layer_outputs(model)
        self._switch = {} if bits is None else {"bits": np.array(bits, np.uint8)}
        self._untouched = open_session(content, optimized=deployed)
        kept = (*self._weights, *self._activations, *self._values)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kept)
        self._traced = open_session(model.SerializeToString(), optimized=deployed)

    def run(self, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
        batches = [inputs[i : i + _BATCH] for i in range(0, len(inputs), _BATCH)]
        # Without optimisations the traced file runs the same operators in the same order.
        traced = [self._run(self._traced, batch) for batch in batches]
        outputs = np.concatenate([parts[0] for parts in traced])
        codes: dict[str, list[Array]] = {}
        for weight, value in zip(self._weights.values(), traced[0][1:], strict=False):
            codes.setdefault(weight, []).append(value)
        inside = [
            np.concatenate(parts) for parts in zip(*(parts[1 + len(self._weights) :] for parts in traced), strict=True)
        ]
        return RuntimeRun(
            "onnxruntime",
            codes,
            dict(zip(self._activations, inside, strict=False)),
            dict(zip(self._values, inside[len(self._activations) :], strict=True)),
            outputs,
            np.concatenate([self._run_untouched(batch) for batch in batches]) if self._deployed else outputs,
        )

    def _run_untouched(self, sample: npt.NDArray[np.float32]) -> Array:
        return self._run(self._untouched, sample)[0]

    def _run(self, session: Any, batch: npt.NDArray[np.float32]) -> list[Array]:
        try:
            results: list[Array] = session.run(None, {session.get_inputs()[0].name: batch, **self._switch})
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            raise InputError(f"onnxruntime does not run the file: {str(error).splitlines()[0]}") from error
        return results


def _layer_outputs(model: onnx.ModelProto) -> list[str]:
    """The last value of each module that computes with floats: names without an operator behind a slash."""
    ends = {value.name for value in model.graph.output}
    kinds = ("Conv", "Gemm", "MatMul", "Add", "BatchNormalization", "Relu")
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type in kinds and "/" not in node.output[0] and node.output[0] not in ends
        if not node.output[0].endswith(".weight")
    ]


class _LiteRT(Runner):
    def __init__(self, content: bytes, bits: int | None, deployed: bool) -> None:
        self._deployed = deployed
        flat, facts = single_graph(content, bits)
        self._kept: Collection[str] = facts.get(CHANNELS_FIRST, ())
        self._stored = stored_integers(flat) if bits is None else {}
        self._activations, self._values, self._shifted = _kept_tensors(flat, layers=not deployed)
        outputs = [int(index) for index in flat.graph.outputs]
        self._ends = len(outputs)
        self._values = {index: name for index, name in self._values.items() if index not in outputs}
        flat.graph.outputs = np.array([*outputs, *self._activations, *self._values, *self._shifted], np.int32)
        flat.model.signatureDefs = None
        self._traced = _Invoker(open_interpreter(flat.pack(), xnnpack=deployed))
        if bits is None:
            self._untouched: Callable[[Array], list[Array]] = _Invoker(open_interpreter(content, xnnpack=deployed))
        else:
            self._untouched = _signature(content, bits, deployed)

    def run(self, inputs: npt.NDArray[np.float32]) -> RuntimeRun:
        traced = [self._run(self._traced, sample) for sample in to_channels_last(inputs)]
        of_samples = len(traced[0]) - len(self._shifted)
        names = (OUTPUT_NAME, *self._activations.values(), *self._values.values())
        columns = zip(*(parts[:1] + parts[self._ends : of_samples] for parts in traced), strict=True)
        ends, *inside = (
            to_channels_first(np.concatenate(parts), kept=name in self._kept)
            for name, parts in zip(names, columns, strict=True)
        )
        codes = {name: list(places) for name, places in self._stored.items()}
        for (name, order), value in zip(self._shifted.values(), traced[0][of_samples:], strict=True):
            codes.setdefault(name, []).append(value.transpose(order))
        return RuntimeRun(
            "LiteRT",
            codes,
            dict(zip(self._activations.values(), inside, strict=False)),
            dict(zip(self._values.values(), inside[len(self._activations) :], strict=True)),
            ends,
            # LiteRT's own kernels are the same whatever is kept.
            np.concatenate([self._run_untouched(x[None]) for x in inputs]) if self._deployed else ends,
        )

    def _run_untouched(self, sample: npt.NDArray[np.float32]) -> Array:
        (outputs, *_) = self._run(self._untouched, to_channels_last(sample)[0])
        return to_channels_first(outputs, kept=OUTPUT_NAME in self._kept)

    def _run(self, invoke: Callable[[Array], list[Array]], sample: Array) -> list[Array]:
        try:
            return invoke(sample[None])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"LiteRT does not run the file: {error}") from error


class _Invoker:
    """An interpreter as a function from one sample to the outputs, in the order of the file."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._source = interpreter.get_input_details()[0]
        self._outputs = [detail["index"] for detail in interpreter.get_output_details()]

    def __call__(self, sample: Array) -> list[Array]:
        wanted = tuple(int(n) for n in self._source["shape"])
        if wanted != sample.shape:
            raise InputError(f"the file takes samples of shape {wanted[1:]}, not {sample.shape[1:]}")
        self._interpreter.set_tensor(self._source["index"], sample)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


def _signature(content: bytes, bits: int, deployed: bool) -> Callable[[Array], list[Array]]:
    """One signature of a run-time file as a function from one sample to the outputs."""
    from tqexport.backends.tflite.file import signature_of

    try:
        runner = open_interpreter(content, xnnpack=deployed).get_signature_runner(signature_of(bits))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"LiteRT does not run the file at {bits} bits: {error}") from error
    (name,) = runner.get_input_details()
    return lambda sample: list(runner(**{name: sample}).values())


def single_graph(content: bytes, bits: int | None) -> tuple[FlatModel, Mapping[str, Any]]:
    """The network of a width as a file of its own, and what the file says of it."""
    if bits is not None:
        from tqexport.backends.onnx.runtime_file import WIDTHS, facts_of_width
        from tqexport.backends.tflite.file import subgraph_of, unpack

        model, facts = unpack(content)
        if bits not in facts.get(WIDTHS, ()):
            raise InputError(f"the file has no signature for {bits} bits")
        return subgraph_of(model, bits), facts_of_width(facts, list(facts[WIDTHS]).index(bits))
    try:
        flat = FlatModel(content)
    except ConversionError as error:
        raise InputError(str(error)) from error
    described = flat.metadata(METADATA_NAME)
    return flat, json.loads(described) if described else {}


_Shifted = dict[int, tuple[str, tuple[int, ...]]]


def _kept_tensors(flat: FlatModel, *, layers: bool) -> tuple[dict[int, str], dict[int, str], _Shifted]:
    """By index: activations, outputs of layers, and shifted codes with the way to PyTorch's axis order."""
    activations: dict[int, str] = {}
    values: dict[int, str] = {}
    shifted: _Shifted = {}
    of_sample = {int(index) for index in flat.graph.inputs}
    for position, operator in enumerate(flat.graph.operators):
        kind, output = flat.operator_name(operator), int(operator.outputs[0])
        if kind == "RIGHT_SHIFT":
            weight = flat.graph.operators[position + 3].outputs[0]
            readers = map(flat.operator_name, flat.consumers(weight))
            shifted[output] = flat.name(weight), next(TO_TORCH[reader] for reader in readers if reader in TO_TORCH)
        if not of_sample.intersection(map(int, operator.inputs)):
            continue
        of_sample.update(map(int, operator.outputs))
        if kind == "ROUND":
            activations[output] = flat.name(output)
        elif layers and (kind in TO_TORCH or kind in ("ADD", "RELU")):
            values[output] = f"{flat.name(output)}#{output}"  # names need not be unique
    return activations, values, shifted


def to_channels_last(x: Array, *, kept: bool = False) -> Array:
    """A value (N, C, ...) as a TFLite file has it; ``kept`` where that is the same."""
    return x if kept or x.ndim < 3 else np.ascontiguousarray(np.moveaxis(x, 1, -1))


def to_channels_first(x: Array, *, kept: bool = False) -> Array:
    """A value of a TFLite file as (N, C, ...); ``kept`` where that is the same."""
    return x if kept or x.ndim < 3 else np.moveaxis(x, -1, 1)
