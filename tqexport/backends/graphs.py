"""Two files of one format as graphs without names: do they hold the same constants, settings and wiring?

Names, the order of operators and what nothing depends on carry no meaning. Graphs are compared from their outputs
backwards: each value of one is paired with the value of the other that stands in its place, until both are constants,
which must be equal, or inputs. A back end reads its files into a :class:`Graph`; nothing here knows a format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError
from tqexport.reading import limits

__all__ = ["FOLDED", "STORED", "Constant", "Graph", "Match", "Node", "fits_in_memory", "fold", "match"]

Array = npt.NDArray[Any]

# How far apart two floats may be, as a share of what was added up to make them.
STORED = 2.0**-22  # rounding of one number, as other releases and other machines' libraries do it
FOLDED = 2.0**-20  # rounding of a few steps: a weight times a gain that was itself computed in float32

_COMMUTATIVE = {"Add", "Mul", "Max", "Min", "Sum", "ADD", "MUL", "MAXIMUM", "MINIMUM"}


@dataclass(frozen=True)
class Constant:
    """A constant of a file.

    Attributes:
        value: Any dtype and shape.
        magnitude: float64, the shape of ``value``: the sum of the absolute terms that it was computed from, which its
            rounding error is a share of. None stands for the absolute value.
    """

    value: Array
    magnitude: Array | None = None

    def terms(self) -> Array:
        """``magnitude``, or the absolute value where that is not known; float64."""
        return np.abs(self.value.astype(np.float64)) if self.magnitude is None else self.magnitude


@dataclass(frozen=True)
class Node:
    """An operator: what it does to which values. An optional input that is left out has the name ``""``.

    Attributes:
        kind: The operator's name.
        settings: Its attributes by name, as plain values; those that are as they are by default are left out.
        inputs: Values that it reads.
        outputs: Values that it writes.
        source: The operator in the file, for whoever made the graph.
    """

    kind: str
    settings: Mapping[str, object]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: Any = None


@dataclass(frozen=True)
class Graph:
    """A file as a graph. Values have names that are unique in it.

    Attributes:
        inputs: Values that are given, in the order of the file.
        outputs: Values that it gives.
        constants: By value.
        nodes: In an order in which they can be computed.
        facts: By value, what the file says of it besides: its type, its grid.
        titles: By value, what people call it; values that are not in here go by their own name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Constant]
    nodes: Sequence[Node]
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)

    def title(self, value: str) -> str:
        """What people call a value."""
        return self.titles.get(value, value)


@dataclass(frozen=True)
class Match:
    """Two graphs of the same structure.

    Attributes:
        names: By value of one's own graph, the value of the fresh one in its place.
        differences: By title of the fresh value, a sentence with both values for each that differs.
    """

    names: Mapping[str, str]
    differences: Mapping[str, str]


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """Operators in an order in which they can be computed.

    Raises:
        InputError: They read each other in a circle.
    """
    maker = {output: number for number, node in enumerate(nodes) for output in node.outputs if output}
    sorter = TopologicalSorter(
        {number: [maker[name] for name in node.inputs if name in maker] for number, node in enumerate(nodes)}
    )
    try:
        return [nodes[number] for number in sorter.static_order()]
    except CycleError as error:
        raise InputError("the operators of the file read each other in a circle; export it again") from error


def fold(graph: Graph, compute: Callable[[Node, Sequence[Constant]], Constant | None]) -> Graph:
    """Compute what depends on constants alone.

    Args:
        graph: The graph; it is not changed.
        compute: Gives the result of an operator on constants, or None where it stays.
    """
    constants, nodes = dict(graph.constants), []
    for node in graph.nodes:
        known = [constants[name] for name in node.inputs if name in constants]
        whole = bool(known) and len(known) == len(node.inputs) and len(node.outputs) == 1
        result = compute(node, known) if whole else None
        if result is None:
            nodes.append(node)
        else:
            constants[node.outputs[0]] = result
    return replace(graph, constants=constants, nodes=nodes)


def fits_in_memory(values: Sequence[Array]) -> bool:
    """Whether what is computed of constants, joined or spread over each other, stays of a size that filters have."""
    sizes = [value.shape for value in values]
    try:
        spread = prod(np.broadcast_shapes(*sizes))
    except ValueError:  # not for each other
        spread = 0
    return max(spread, sum(map(prod, sizes))) <= limits.CONSTANT_ELEMENTS


def match(fresh: Graph, own: Graph, tolerance: float) -> Match | None:
    """Compare a file with a fresh export.

    Args:
        fresh: What the checkpoint gives.
        own: The file.
        tolerance: How far apart two floats may be, as a share of their magnitude.

    Returns:
        What differs; None where the two have different structures: other operators, or wired otherwise.
    """
    known: dict[object, int] = {}
    of_fresh, of_own = _Structure(fresh, known), _Structure(own, known)
    if list(map(of_fresh.shape, fresh.outputs)) != list(map(of_own.shape, own.outputs)):
        return None
    names: dict[str, str] = {}
    differences: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = list(zip(fresh.outputs, own.outputs, strict=True))[::-1]
    found: list[tuple[int, str, str]] = []
    while waiting:
        pair = waiting.pop()
        if pair in seen or pair == ("", ""):
            continue
        seen.add(pair)
        value, other = pair
        names.setdefault(other, value)
        found += [
            (of_fresh.place(value), fresh.title(value), text) for text in _differences(fresh, own, pair, tolerance)
        ]
        node, twin = of_fresh.maker.get(value), of_own.maker.get(other)
        if node is not None and twin is not None:
            waiting += zip(of_fresh.operands(node), of_own.operands(twin), strict=True)
            found += [(of_fresh.place(value), fresh.title(value), text) for text in _settings(node, twin)]
    for _, title, text in sorted(found, key=lambda item: item[0]):
        differences.setdefault(title, f"{title}: {text}")
    return Match(names, differences)


class _Structure:
    """What a graph is but for constants, settings and names: equal structures have equal numbers."""

    def __init__(self, graph: Graph, known: dict[object, int]) -> None:
        self._graph, self._known = graph, known
        self.maker = {output: node for node in graph.nodes for output in node.outputs if output}
        self._places = {output: i for i, node in enumerate(graph.nodes) for output in node.outputs}
        self._first_reader = {name: i for i, node in reversed([*enumerate(graph.nodes)]) for name in node.inputs}
        self._shapes: dict[str, int] = {"": self._number("left out")}
        self._sizes: dict[str, float] = {"": 0.0}
        for position, name in enumerate(graph.inputs):
            self._shapes[name], self._sizes[name] = self._number(("input", position)), 0.0
        for name, constant in graph.constants.items():
            self._shapes[name] = self._number((constant.value.dtype.str, constant.value.shape))
            finite = np.nan_to_num(constant.terms(), posinf=1e30)
            self._sizes[name] = float(finite.mean()) if finite.size else 0.0
        for node in graph.nodes:
            operands = self.operands(node)
            sizes = [self._sizes.get(name, 0.0) for name in operands]
            for slot, output in enumerate(node.outputs):
                self._shapes[output] = self._number((node.kind, slot, tuple(map(self.shape, operands))))
                self._sizes[output] = sum(sizes) / max(len(sizes), 1)

    def shape(self, name: str) -> int:
        """The number of what a value is computed from."""
        return self._shapes.get(name, -1)

    def operands(self, node: Node) -> list[str]:
        """What an operator reads, in an order that does not depend on the file where it may be any."""
        inputs = list(node.inputs)
        if node.kind in _COMMUTATIVE:
            inputs.sort(key=lambda name: (self.shape(name), self._sizes.get(name, 0.0)))
        return inputs

    def place(self, name: str) -> int:
        """Where in the network a value comes first."""
        return self._places.get(name, self._first_reader.get(name, -1))

    def _number(self, structure: object) -> int:
        return self._known.setdefault(structure, len(self._known))


def _differences(fresh: Graph, own: Graph, pair: tuple[str, str], tolerance: float) -> Iterator[str]:
    """What two values in the same place have otherwise."""
    value, other = pair
    if value in fresh.constants and other in own.constants:
        yield from _unequal(fresh.constants[value], own.constants[other], tolerance)
    facts, others = fresh.facts.get(value, {}), own.facts.get(other, {})
    for name in [*facts, *(name for name in others if name not in facts)]:
        one, two = facts.get(name), others.get(name)
        if (
            isinstance(one, np.ndarray)
            and isinstance(two, np.ndarray)
            and (one.size == two.size or 1 in (one.size, two.size))
        ):
            both = np.broadcast_arrays(one, two)  # one number for all channels stands for as many equal ones
            yield from (f"its {name}, {text}" for text in _unequal(Constant(both[0]), Constant(both[1]), tolerance))
        elif str(one) != str(two):
            yield f"its {name} is {two} where the checkpoint gives {one}"


def _settings(node: Node, twin: Node) -> Iterator[str]:
    """The settings that two operators have otherwise."""
    for name in sorted({*node.settings, *twin.settings}):
        one, two = node.settings.get(name, "the default"), twin.settings.get(name, "the default")
        if one != two:
            yield f"{name} of its {node.kind} is {two} where the checkpoint gives {one}"


def _unequal(expected: Constant, stored: Constant, tolerance: float) -> Iterator[str]:
    """A sentence on two constants of the same type and shape that are not equal up to rounding."""
    one, two = expected.value, stored.value
    wrong = one != two
    if np.issubdtype(one.dtype, np.floating) and wrong.any():
        wrong &= ~(np.isnan(one) & np.isnan(two))
        with np.errstate(all="ignore"):
            apart = np.abs(one.astype(np.float64) - two.astype(np.float64))
            allowed = tolerance * np.maximum(expected.terms(), stored.terms())
        wrong &= ~(apart <= allowed)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f" at {index}" if index else ""
        number = f"{int(wrong.sum())} of {wrong.size} values differ, first{where}: " if wrong.size > 1 else "it is "
        yield f"{number}{two[index]} where the checkpoint gives {one[index]}"
