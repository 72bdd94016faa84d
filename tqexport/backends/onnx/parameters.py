"""The constants, attributes and wiring of an ONNX file against those of a fresh export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx

from tqexport.backends.onnx.file import parse, read_facts, steps_in_front, write_facts
from tqexport.backends.onnx.folding import FoldedWeights, folded_weights, forms
from tqexport.backends.onnx.graph import drop_identities, graph_of, opset_of
from tqexport.backends.onnx.session import OnnxSession
from tqexport.backends.onnx.truncatable import plain_file
from tqexport.backends.parameters import REWRITTEN, Parameters, different_facts, matched
from tqexport.errors import InputError
from tqexport.facts import ArtifactFacts, Facts, MultiWidthFacts

__all__ = ["compare_parameters", "without_roundings"]

_OLDEST_OPSET = 13  # before it, Softmax and others are other operators of the same name


def compare_parameters(content: bytes, fresh: bytes, bits: int) -> Parameters:
    """Compare a file with a fresh export; see :meth:`tqexport.backends.base.Backend.compare_parameters`."""
    if content == fresh:
        return Parameters(content)
    expected = plain_file(parse(fresh))
    content = _with_steps(content, steps_in_front(expected))
    model = plain_file(parse(content))
    for each in (model, expected):
        drop_identities(each.graph)
    expected_facts = _facts(expected, bits)
    found, folded = None, FoldedWeights()
    if opset_of(model) >= _OLDEST_OPSET:
        one, two = (forms(graph_of(each)) for each in (expected, model))
        found = matched(one, two, expected_facts)
        folded = FoldedWeights() if found else folded_weights(one, two)
    differences = {} if expected_facts is None else different_facts(expected_facts, _facts(model, bits))
    if found is None:
        # What a layer computes with a BatchNorm has the layer's name, and is not what the layer computes in PyTorch.
        names = {name: f"{name}/with_norm" for name in folded.with_norm}
        content = _renamed(parse(content), names, others="") if names else content
        return Parameters(content, differences, REWRITTEN, folded.names)
    return Parameters(_renamed(model, found.names), {**found.differences, **differences})


def _with_steps(content: bytes, steps: Mapping[str, int]) -> bytes:
    """A file that says how many steps values have in front of their samples: a tool that fixed the batch does not."""
    if not steps:
        return content
    model = parse(content)
    facts = _said(model)
    if facts is None or steps_in_front(model):
        return content
    if isinstance(facts, MultiWidthFacts):
        by_width = {bits: replace(own, steps_in_front=steps) for bits, own in facts.by_width.items()}
        write_facts(model, replace(facts, by_width=by_width))
    else:
        write_facts(model, replace(facts, steps_in_front=steps))
    changed: bytes = model.SerializeToString(deterministic=True)
    return changed


def without_roundings(content: bytes, bits: int | None) -> OnnxSession:
    """A file without its roundings of activations, so that all it computes is continuous."""
    model = parse(content)
    for node in model.graph.node:
        if node.op_type == "Round":
            node.op_type = "Identity"
    return OnnxSession(model.SerializeToString(), bits=bits)


def _facts(model: onnx.ModelProto, bits: int) -> ArtifactFacts | None:
    """What a file says of itself at a width; None where that was lost as it was rewritten."""
    facts = _said(model)
    return facts.by_width.get(bits) if isinstance(facts, MultiWidthFacts) else facts


def _said(model: onnx.ModelProto) -> Facts | None:
    """What a file says of itself; None where that was lost as it was rewritten."""
    try:
        return read_facts(model)
    except InputError:
        return None


def _renamed(model: onnx.ModelProto, names: Mapping[str, str], others: str = "rewritten/") -> bytes:
    """A file with new names for some values, and letters in front of those of others; its ends keep theirs."""
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    given: dict[str, str] = {}
    taken = {*ends, ""}
    for name, new in names.items():
        if name and name not in ends:
            given[name] = new if new not in taken else f"{new}/again_{len(given)}"
            taken.add(given[name])

    def rename(values: Iterable[str]) -> list[str]:
        return [name if name in ends or not name else given.get(name, f"{others}{name}") for name in values]

    for tensor in model.graph.initializer:
        (tensor.name,) = rename([tensor.name])
    for node in model.graph.node:
        node.input[:], node.output[:] = rename(node.input), rename(node.output)
    del model.graph.value_info[:]  # of the names of before
    content: bytes = model.SerializeToString(deterministic=True)
    return content
