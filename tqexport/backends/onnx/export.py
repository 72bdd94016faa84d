"""ONNX files with 8-bit codes and an explicit BitShift.

A network is captured once into a template, an ONNX graph without the values of any width; a width is a set of
initializer values put into it.
"""

from __future__ import annotations

import ast
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset20 as op
from onnxscript.optimizer import fold_constants
from torch import nn
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tqexport.backends.onnx import LAYOUT
from tqexport.backends.onnx.file import BATCH, CONSTANT_PREFIX, write_facts
from tqexport.backends.onnx.fixed_batch import fix_batch
from tqexport.backends.onnx.samples_apart import refuse_dependent_samples, with_fine_levels
from tqexport.deploy import buffers_in_file_order, deploy, deployed_values
from tqexport.errors import ConversionError, first_line
from tqexport.facts import ArtifactFacts, facts_of_model
from tqexport.model import InputInfo, TruncModel, dynamic_sizes
from tqexport.outputs import run_network, zeros_for
from tqexport.training.quantizers import plain_name
from tqexport.truncation import FLOAT_BITS

__all__ = ["OPSET", "capture", "export_onnx", "render"]

OPSET = 20
IR_VERSION = 10  # what every onnxruntime of the last years reads


def export_onnx(model: TruncModel, widths: tuple[int, ...], batch: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Export a network at several widths for little more than the price of one.

    Args:
        model: The reference network.
        widths: The widths, each one that ``model`` has.
        batch: How many samples the files take at once; None for any number.

    Yields:
        Each width with its serialised ONNX file, in the order asked for. The same checkpoint gives the same bytes.

    Raises:
        InputError: The checkpoint lacks a width.
        ConversionError: The network cannot be captured, or not for a fixed batch.
    """
    for bits in widths:
        model.check_width(bits)
    # By whether activations are plain ReLU (32 bits), which is another graph: it, and what its facts are besides.
    templates: dict[bool, tuple[ir.Model, Mapping[str, int]]] = {}
    for bits in widths:
        deployed = deploy(model, bits)
        facts = facts_of_model(model, bits, LAYOUT, sizes=dynamic_sizes(model.info.signature))
        relu = model.info.activation_width(bits) == FLOAT_BITS
        if relu not in templates:
            template = capture(deployed, model.info.signature)
            templates[relu] = template, {} if batch is None else _with_batch(template, batch, deployed, facts)
        template, steps = templates[relu]
        yield bits, render(template, deployed, replace(facts, steps_in_front=steps))


def capture(deployed: nn.Module, inputs: Sequence[InputInfo]) -> ir.Model:
    """Capture a deployed network as an ONNX graph with a dynamic batch, and other dynamic axes where inputs have them.

    Args:
        deployed: See :func:`tqexport.deploy.deploy`.
        inputs: What it takes.

    Returns:
        The graph; its initializers carry the names of the deployed network's state dict.

    Raises:
        ConversionError: torch.export cannot take the network, a size that is to be free is not, or the network returns
            something else than tensors.
    """
    sample = tuple(zeros_for(inputs, 2))
    try:
        with torch.no_grad():
            outputs = run_network(deployed, sample)
    except ConversionError:
        raise
    except Exception as error:  # the network's own code raises whatever it raises
        shapes = ", ".join(f"{each.name} {(2, *each.shape)}" for each in inputs)
        raise ConversionError(f"the network does not run on inputs of zeros, {shapes}: {first_line(error)}") from error
    sizes = {name: torch.export.Dim(name) for name in (BATCH, *dynamic_sizes(inputs))}
    axes = [{0: BATCH, **{axis + 1: name for axis, name in each.dynamic_axes.items()}} for each in inputs]
    try:
        # Attention is written out, and then its results have another order in memory than those of a fused kernel: a
        # reshape behind it that was traced with that one might not fit.
        with _quiet(), sdpa_kernel(SDPBackend.MATH), _ProjectionsByStep():
            program = torch.onnx.export(
                deployed,
                sample,
                dynamo=True,
                optimize=False,  # it would fold the BitShift of small layers away
                opset_version=OPSET,
                input_names=[each.name for each in inputs],
                dynamic_shapes=tuple({axis: sizes[name] for axis, name in own.items()} for own in axes),
                custom_translation_table={
                    torch.ops.tqexport.truncate.default: _truncate,
                    torch.ops.tqexport.quantize_activation.default: _quantize_activation,
                    torch.ops.tqexport.quantize_range.default: _quantize_range,
                },
                verbose=False,
            )
    except Exception as error:  # torch.export raises whatever the network's own code raises
        raise _why_not_captured(error) from error
    assert program is not None
    graph_model: ir.Model = program.model
    _check_free(graph_model.graph, axes)
    named = set(deployed_values(deployed))
    aliases = _aliases(deployed)
    _put_initializers_in_order(graph_model.graph, buffers_in_file_order(deployed), aliases)
    _simplify(graph_model, named)
    _name_ends(graph_model.graph, [each.name for each in inputs], [*outputs])
    _name_after_modules(graph_model, named, aliases)
    passes.ClearMetadataAndDocStringPass()(graph_model)
    for value in (*graph_model.graph.inputs, *graph_model.graph.outputs):
        value.metadata_props.clear()  # the pass leaves those of the graph's ends
    graph_model.ir_version = IR_VERSION
    graph_model.producer_name = "tqexport"
    graph_model.producer_version = None
    graph_model.graph.name = "network"
    return graph_model


def _with_batch(template: ir.Model, batch: int, deployed: nn.Module, facts: ArtifactFacts) -> Mapping[str, int]:
    """Fix the batch of a captured network, in place; see :func:`fix_batch`.

    Raises:
        ConversionError: Samples depend on each other, or are not in front in an output.
    """
    named = set(deployed_values(deployed))
    pair = template.clone()
    for each, count in ((pair, 2), (template, batch)):  # of two samples, to see whether they are apart
        steps = fix_batch(each, count, partial(_simplify, named=named), _initializer)
        _number_constants(each.graph, named)
    refuse_dependent_samples(with_fine_levels(onnx.load_from_string(render(pair, deployed, facts))))
    return steps


def render(template: ir.Model, deployed: nn.Module, facts: ArtifactFacts) -> bytes:
    """Put the values of one width into a template.

    Args:
        template: From :func:`capture`, of the same network.
        deployed: The network deployed at the width.
        facts: What the file is to say of itself.

    Returns:
        The serialised, checked ONNX model.
    """
    values = deployed_values(deployed)
    for name, initializer in template.graph.initializers.items():
        if name in values:
            initializer.const_value = ir.Tensor(values[name].detach().contiguous().numpy(), name=name)
    proto = ir.to_proto(template)
    del proto.graph.value_info[:]  # shapes that every reader infers again, a fifth of a small file
    write_facts(proto, facts)
    content: bytes = proto.SerializeToString(deterministic=True)
    onnx.checker.check_model(content, full_check=True)
    return content


class _ProjectionsByStep(TorchFunctionMode):
    """Within the block, an LSTM with ``proj_size`` is PyTorch's own steps: the LSTM of ONNX has no projection."""

    def __init__(self) -> None:
        super().__init__()
        operator = torch.ops.aten.lstm.input
        self._steps = get_decompositions([operator])[operator]  # the exporter puts a loop in its place

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.lstm and isinstance(args[1], Sequence):  # and not a packed sequence
            hidden, cell = args[1]
            if hidden.shape[2] != cell.shape[2]:
                func = self._steps
        return func(*args, **(kwargs or {}))


def _check_free(graph: ir.Graph, axes: Sequence[Mapping[int, str]]) -> None:
    """Refuse a network that computes with the number of a size that is to be free; the exporter keeps it silently."""
    for value, own in zip(graph.inputs, axes, strict=True):
        for axis, name in own.items():
            size = None if value.shape is None else value.shape[axis]
            if not isinstance(size, ir.SymbolicDim):
                why = "as where a layer behind a flatten has one number of inputs"
                remedy = "pool before it, or leave it out of dynamic"
                if name == BATCH:
                    remedy = (
                        "take it from the input's shape: x.shape[0], not len(x), which is a number for torch.export"
                    )
                raise ConversionError(f"the network computes with a {name} of {size} alone, {why}; {remedy}")


def _truncate(codes: Any, shift: Any) -> Any:
    return op.BitShift(codes, shift, direction="RIGHT")


def _quantize_activation(input: Any, levels: Any) -> Any:
    return _quantize_range(input, 0.0, 1.0, levels)


def _quantize_range(input: Any, low: Any, high: Any, levels: Any) -> Any:
    return op.Div(op.Round(op.Mul(op.Clip(input, low, high), levels)), levels)


def _why_not_captured(error: Exception) -> ConversionError:
    """What stood in the way of capturing the network, and what to do."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if "DataDependent" in type(cause).__name__:
        packages = {Path(torch.__file__).parent, Path(__file__).parents[2]}
        frames = traceback.extract_tb(cause.__traceback__)
        own = [frame for frame in frames if not packages & {*Path(frame.filename).parents}]
        where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
        return ConversionError(
            f"the network decides by the values of a sample what it computes{where}, and a file computes the same for "
            "all of them; use torch.where, or take the decision out of the network"
        )
    return ConversionError(f"the network cannot be captured by torch.export: {first_line(cause)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about itself (absent torchvision, deprecations, graphs) off the user's terminal."""
    loggers = {name: logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnxscript")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            loggers[name].setLevel(level)


def _simplify(model: ir.Model, named: set[str]) -> None:
    """Fold what does not depend on a tensor of the network, so that nothing of a width is folded in."""

    def independent(node: ir.Node) -> bool:
        return all(value is None or value.name not in named for value in node.inputs)

    with _quiet():  # of operators that it cannot evaluate, which stay
        fold_constants(model, should_fold=lambda node: None if independent(node) else False)
    for node in model.graph:
        if node.op_type == "Conv" and len(node.inputs) == 3:
            bias = node.inputs[2]
            value = None if bias is None or bias.name in named else ir.convenience.get_const_tensor(bias)
            if value is not None and not np.any(value.numpy()):
                node.resize_inputs(2)  # the exporter writes a bias of zeros where there is none
        elif node.op_type == "Reshape":
            _fix_target_shape(model.graph, node)
        elif node.op_type == "Pad" and any(user.op_type == "MaxPool" for user in node.outputs[0].consumers()):
            _name_axes(model.graph, node)
    passes.IdentityEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveUnusedNodesPass()(model)


def _name_axes(graph: ir.Graph, node: ir.Node) -> None:
    """Give a Pad the axes that it has anyway.

    onnxruntime (1.31) makes one operator of a Pad and the MaxPool behind it, which computes with minus infinity where
    the Pad puts zeros; but not of a Pad with axes.
    """
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(node.inputs) > 3:
        return
    axes = np.arange(len(shape))
    node.resize_inputs(4)
    node.replace_input_with(3, _initializer(graph, "axes", axes))


def _initializer(graph: ir.Graph, what: str, value: npt.NDArray[np.int64]) -> ir.Value:
    """A constant of whole numbers; equal ones once."""
    name = f"{what}_{'_'.join(map(str, value)).replace('-1', 'batch')}"
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.Tensor(value, name=name)))
    return graph.initializers[name]


def _fix_target_shape(graph: ir.Graph, node: ir.Node) -> None:
    """Give a Reshape a constant target where only the batch is free; the exporter computes it at run time."""
    shape = node.outputs[0].shape
    if shape is None or sum(not isinstance(dim, int) for dim in shape) != 1:
        return
    target = np.array([dim if isinstance(dim, int) else -1 for dim in shape], np.int64)
    node.replace_input_with(1, _initializer(graph, "shape", target))


def _aliases(network: nn.Module) -> dict[str, str]:
    """By every further name of a module that has several, the first one, which it has everywhere else."""
    first: dict[nn.Module, str] = {}
    named = [*network.named_modules(remove_duplicate=False)]
    return {name: first[module] for name, module in named if first.setdefault(module, name) != name}


def _first_name(name: str, aliases: Mapping[str, str]) -> str:
    """The name of a module or of something in it, by the first name of the module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (module := aliases.get(".".join(parts[:length]))) is not None:
            return ".".join([module, *parts[length:]])
    return name


def _put_initializers_in_order(graph: ir.Graph, buffers: Sequence[str], aliases: Mapping[str, str]) -> None:
    """Name initializers as checkpoints do; float parameters come first, then buffers in the order given."""
    initializers = list(graph.initializers.values())
    graph.initializers.clear()
    for initializer in initializers:
        initializer.name = plain_name(_first_name(str(initializer.name), aliases))
    place = {name: position for position, name in enumerate(buffers)}
    for initializer in sorted(initializers, key=lambda initializer: place.get(str(initializer.name), -1)):
        graph.initializers.add(initializer)


def _name_ends(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the ends; an output that is an input, or another output as well, becomes a value of its own."""
    taken = {id(value) for value in graph.inputs}
    for position, value in enumerate(graph.outputs):
        if id(value) in taken:
            copied = ir.node("Identity", [value])
            graph.append(copied)
            graph.outputs[position] = copied.outputs[0]
            copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
        taken.add(id(graph.outputs[position]))
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name


def _name_after_modules(model: ir.Model, named: set[str], aliases: Mapping[str, str]) -> None:
    """Name each module's last value after the module, and what is inside it ``module/operator``."""
    used: dict[str, int] = {}
    last_of: dict[str, ir.Value] = {}
    fixed = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        module = plain_name(_first_name(scopes[-2], aliases)) if len(scopes) > 1 else ""
        stem = f"{module}/{node.op_type}" if module else node.op_type
        used[stem] = used.get(stem, 0) + 1
        node.name = stem if used[stem] == 1 else f"{stem}_{used[stem]}"
        for position, value in enumerate(node.outputs):
            if id(value) not in fixed:
                value.name = node.name if position == 0 else f"{node.name}:{position}"
        if module:
            last_of[module] = node.outputs[0]
    for module, value in last_of.items():
        if id(value) not in fixed:
            value.name = module
    _number_constants(model.graph, named)


def _number_constants(graph: ir.Graph, named: set[str]) -> None:
    """Name constants that are no tensors of the network by their number."""
    constants = [graph.initializers.pop(name) for name in [*graph.initializers] if name not in named]
    for number, constant in enumerate(constants):
        constant.name = f"{CONSTANT_PREFIX}{number}"
        graph.initializers.add(constant)
