"""From the ONNX files of one network to TFLite files, codes intact.

A fixed ONNX file becomes a float network that onnx2tf can take (``float_graph.py``); all widths of one graph are
converted once (``template.py``); what came out is checked against onnxruntime (``check.py``) and named; then the codes
go back in (``encode.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema

from tqexport.backends.base import EXACT
from tqexport.backends.coded_weight import CodedWeight
from tqexport.backends.onnx.file import coded_weights, read_facts
from tqexport.backends.onnx.samples_apart import input_limits, refuse_dependent_samples, with_fine_levels
from tqexport.backends.tflite.check import layout_of_values, refuse_changed_weights, refuse_operators
from tqexport.backends.tflite.computed import with_constants_computed
from tqexport.backends.tflite.encode import put_codes_back
from tqexport.backends.tflite.file import finish_fixed
from tqexport.backends.tflite.fingerprints import parameters
from tqexport.backends.tflite.flatbuffer import FlatModel
from tqexport.backends.tflite.float_graph import (
    FloatGraph,
    for_batch,
    with_float_weights,
    with_weights_in_shape,
    without_batch_norms,
)
from tqexport.backends.tflite.layout import LAYOUT
from tqexport.backends.tflite.lowered import lowered
from tqexport.backends.tflite.onnx2tf import ends
from tqexport.backends.tflite.parts import with_parts
from tqexport.backends.tflite.provenance import FilterOrigin
from tqexport.backends.tflite.sampled import with_grids_written_out
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.backends.tflite.template import TfliteTemplate, convert_to_templates, graph_key
from tqexport.backends.tflite.unrolled import unrolled
from tqexport.errors import ConversionError, InputError, about
from tqexport.facts import ArtifactFacts

__all__ = ["FloatNetwork", "check_convertible", "convert_to_tflite", "float_networks", "run_once"]


@dataclass(frozen=True)
class FloatNetwork:
    """A network as the converter wrote it, checked and named; its codes are not back yet.

    Attributes:
        flat: The file, with float32 filters.
        weights: Its quantised weights.
        origins: Where its filters come from.
        facts: What the file is to say of itself, but for the kernel.
    """

    flat: FlatModel
    weights: Sequence[CodedWeight]
    origins: Sequence[FilterOrigin]
    facts: ArtifactFacts


def convert_to_tflite(models: Sequence[onnx.ModelProto], kernel: str = EXACT, batch: int = 1) -> list[bytes]:
    """Convert ONNX files of tqexport to TFLite, codes intact.

    The result takes channels last (NHWC), one sample at a time unless ``batch`` says otherwise, as devices do.

    Args:
        models: ONNX models with BitShift nodes, at any widths.
        kernel: See :func:`tqexport.backends.tflite.encode.put_codes_back`.
        batch: How many samples a file takes at once.

    Returns:
        One serialised, loaded and tried TFLite file per model. The same model gives the same bytes.

    Raises:
        ConversionError: onnx2tf cannot convert the network, a layer's codes are not found again, an operator would
            need code of its own on the device, or LiteRT does not run the file.
    """
    results = []
    for network in float_networks(models, batch):
        put_codes_back(network.flat, network.weights, network.origins, kernel)
        content = finish_fixed(network.flat, replace(network.facts, kernel=kernel))
        run_once(content)
        results.append(content)
    return results


def check_convertible(models: Sequence[onnx.ModelProto], batch: int = 1) -> None:
    """Refuse ONNX files of tqexport that cannot be converted, as far as that shows without converting them.

    Raises:
        ConversionError: As :func:`tqexport.backends.tflite.check.refuse_operators` and ``refuse_dependent_samples``.
    """
    for model in {graph_key(graph.model): graph.model for graph in _float_graphs(models, batch)}.values():
        refuse_operators(model)
        refuse_dependent_samples(with_fine_levels(model))


def float_networks(models: Sequence[onnx.ModelProto], batch: int = 1) -> Iterator[FloatNetwork]:
    """Convert ONNX files of tqexport to float TFLite, one at a time; those of one graph cost one conversion.

    Raises:
        ConversionError: As :func:`convert_to_tflite`.
    """
    for model, converted in zip(models, _converted(models, batch), strict=True):
        flat, coded, origins, (channels_first, steps) = converted
        facts = read_facts(model)
        if not isinstance(facts, ArtifactFacts):
            raise InputError("the ONNX file holds several widths; convert a file of one width each")
        facts = replace(
            facts, layout=LAYOUT, channels_first=tuple(channels_first), steps_in_front=steps, dynamic_sizes={}
        )
        yield FloatNetwork(flat, coded, origins, facts)


def _float_graphs(models: Sequence[onnx.ModelProto], batch: int) -> list[FloatGraph]:
    """What the converter is given for each file.

    Raises:
        ConversionError: A part of a weight is used, or what is computed from it, which TFLite has no codes of, or a
            recurrent layer has too many steps.
    """
    graphs = []
    for model in models:
        coded, facts = coded_weights(model), read_facts(model)
        sizes = facts.dynamic_sizes if isinstance(facts, ArtifactFacts) else {}
        graph = for_batch(without_batch_norms(with_float_weights(model, coded)), batch, sizes)
        network, weights = with_parts(graph.model, coded)
        network = with_weights_in_shape(with_grids_written_out(unrolled(network)))
        steps = with_constants_computed(network, {weight.name for weight in weights})
        graph = replace(graph, model=lowered(steps), weights=weights)
        refuse_changed_weights(graph.model, weights)
        graphs.append(graph)
    return graphs


def _converted(
    sources: Sequence[onnx.ModelProto], batch: int
) -> Iterator[tuple[FlatModel, Sequence[CodedWeight], Sequence[FilterOrigin], tuple[Sequence[str], Mapping[str, int]]]]:
    """Convert ONNX files to float TFLite; those that differ in their parameters alone are converted once.

    Yields:
        The file of each; its quantised weights; where its filters come from; and how its values lie, see
        :func:`tqexport.backends.tflite.check.layout_of_values`.
    """
    graphs = _float_graphs(sources, batch)
    keys = [graph_key(graph.model) for graph in graphs]
    one_of = dict(zip(keys, (graph.model for graph in graphs), strict=True))
    for model in one_of.values():
        refuse_operators(model)
        refuse_dependent_samples(with_fine_levels(model))
    weights = {weight.name for graph in graphs for weight in graph.weights}
    templates = dict(
        zip(one_of, convert_to_templates([*one_of.values()], weights, input_limits(sources[0])), strict=True)
    )

    def written(template: TfliteTemplate, model: onnx.ModelProto) -> FlatModel:
        flat = template.fill(parameters(model))
        _check_operators(flat)
        _copy_second_factors(flat)
        _name_tensors(flat, model.graph, template.rounds)
        return flat

    for graph, key in zip(graphs, keys, strict=True):
        template, continuous = templates[key], with_fine_levels(graph.model)
        layout = layout_of_values(continuous, written(template, continuous))
        flat = written(template, graph.model)
        yield flat, graph.weights, template.origins(flat, parameters(graph.model), graph.folded), layout


def run_once(content: bytes, bits: int | None = None) -> None:
    """Load a file in LiteRT and run it on zeros, with XNNPACK and without.

    Args:
        content: The file.
        bits: The width to run a run-time file at; None for a fixed file.

    Raises:
        ConversionError: It does not load, does not run, or gives NaN.
    """
    where = "" if bits is None else f" at {bits} bits"
    for xnnpack in (True, False):
        with about(f"LiteRT does not run the converted file{where}:", ConversionError):
            outputs = LiteRTSession(content, bits=bits, xnnpack=xnnpack).run_zeros()
        if not all(np.isfinite(output).all() for output in outputs):
            raise ConversionError(f"the converted file gives NaN or infinity{where} on an input of zeros")


def _copy_second_factors(flat: FlatModel) -> None:
    """Give a product of a value with itself two values: XNNPACK computes it wrongly where both are one tensor."""
    for operator in [*flat.graph.operators]:
        left, right = (int(index) for index in operator.inputs[:2]) if len(operator.inputs) > 1 else (0, 1)
        if flat.operator_name(operator) == "BATCH_MATMUL" and left == right:
            copied = flat.add_tensor("copy", flat.shape(right))
            shape = flat.add_constant("shape", np.array(flat.shape(right), np.int32))
            reshape = flat.operator("RESHAPE", [right, shape], copied, schema.ReshapeOptionsT())
            flat.graph.operators.insert(flat.graph.operators.index(operator), reshape)
            operator.inputs = np.array([left, copied], np.int32)


def _check_operators(flat: FlatModel) -> None:
    """Refuse a file with an operator that plain TFLite does not have."""
    for operator in flat.graph.operators:
        custom = flat.model.operatorCodes[operator.opcodeIndex].customCode
        if custom or flat.operator_name(operator) == "CUSTOM":
            name = custom.decode() if custom else "CUSTOM"
            raise ConversionError(f"the network needs the operator {name}, which plain TFLite does not have")


def _name_tensors(flat: FlatModel, graph: onnx.GraphProto, rounds: Sequence[str]) -> None:
    """Names that depend on the network alone, where TensorFlow counts what it did before.

    Args:
        flat: The file; changed in place.
        graph: What was converted.
        rounds: See :class:`TfliteTemplate`; the numbers survive where the order of operators in the file does not.
    """
    _put_ends_in_order(flat, graph)
    for index, tensor in enumerate(flat.graph.tensors):
        tensor.name = f"constant_{index}" if flat.constant(index) is not None else f"value_{index}/{flat.name(index)}"
    for operator in flat.graph.operators:
        kind = flat.operator_name(operator)
        for index in map(int, operator.outputs):
            number = re.search(r"/tf\.math\.round(?:_(\d+))?/", flat.name(index)) if kind == "ROUND" else None
            flat.tensor(index).name = rounds[int(number[1] or 0)] if number else f"{kind.lower()}_{index}"
    for names, indices in (
        ([value.name for value in graph.input], flat.graph.inputs),
        ([value.name for value in graph.output], flat.graph.outputs),
    ):
        for name, index in zip(names, indices, strict=True):
            flat.tensor(index).name = name
    flat.graph.name = "network"


def _put_ends_in_order(flat: FlatModel, graph: onnx.GraphProto) -> None:
    """Put inputs and outputs in the order of the network; the converter has another.

    Raises:
        ConversionError: Two ends are the same value, or the converter left one out.
    """
    given, returned = ends(flat)
    try:
        inputs = [given[value.name] for value in graph.input]
        outputs = [returned[f"output_{number}"] for number in range(len(graph.output))]
    except KeyError as error:
        raise ConversionError(f"onnx2tf left {error} out of what it wrote; deploy the network as ONNX") from error
    names: dict[int, str] = {}
    for index, value in zip((*inputs, *outputs), (*graph.input, *graph.output), strict=True):
        if index in names:
            raise ConversionError(
                f"{value.name} is the same value as {names[index]}, which a TFLite file has once; return it once"
            )
        names[index] = value.name
    flat.graph.inputs, flat.graph.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
