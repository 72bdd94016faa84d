"""Which operations become one integer operation, and which values need a grid of their own.

A convolution takes the BatchNorm behind it along. What then stands alone in front of an activation quantiser is rounded
straight to the quantiser's levels, also through a maximum or a reshape, which commute with rounding. Whatever is left
needs a grid of its own: the input, sums and their terms, joined and averaged values, plain ReLUs, the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from tqexport.errors import ConversionError
from tqexport.integer.capture import Call, Capture
from tqexport.integer.naming import INPUT

__all__ = ["Plan", "Step", "plan_of"]

_COMPUTES = ("conv", "linear", "batch_norm", "add", "cat", "mean", "average_pool")
_PASSES = ("max_pool", "reshape")  # the levels of their output are levels of their input
_ROUNDS = ("quantize", "clamp", "relu")


@dataclass(frozen=True)
class Step:
    """One integer operation.

    Attributes:
        call: What it computes.
        output: Name of its output: that of the last call it takes along.
        inputs: Outputs of earlier steps, or ``input``.
        norm: A BatchNorm that it takes along.
        rounding: The activation whose levels its output has; None where the output's grid is named.
        grid: The name of its output's grid; None where the levels are those of an activation quantiser, or its
            input's, as of a maximum or a reshape.
    """

    call: Call
    output: str
    inputs: tuple[str, ...]
    norm: Call | None = None
    rounding: Call | None = None
    grid: str | None = None

    @property
    def keeps_levels(self) -> bool:
        """Whether its output has the grid of its input."""
        return self.call.kind in _PASSES


@dataclass(frozen=True)
class Plan:
    """A network as integer operations.

    Attributes:
        steps: In the order they run.
        output: The value that the network returns.
        grids: The values that need a grid of their own: the input first.
        fixed: Those of them whose grid is known without looking at data: a clamp to [0, 1].
    """

    steps: tuple[Step, ...]
    output: str
    grids: tuple[str, ...]
    fixed: frozenset[str]


def plan_of(capture: Capture) -> Plan:
    """Plan the integer form of a network.

    Raises:
        ConversionError: A BatchNorm stands where it cannot be computed in integers.
    """
    values: dict[str, str] = {INPUT: INPUT}  # from calls to the step outputs that hold their values
    taken: set[str] = set()  # calls that are part of an earlier step
    passed: set[str] = set()  # activations whose input has their levels already
    steps: list[Step] = []
    for call in capture.calls:
        if call.name in taken:
            continue
        if call.name in passed:
            values[call.name] = values[call.inputs[0]]
            continue
        end, norm = call, None
        follower = _sole_reader(capture, call.name)
        if call.kind in ("conv", "linear") and follower is not None and follower.kind == "batch_norm":
            end = norm = follower
        path = (
            [call] if call.kind in _ROUNDS else _path_to_rounding(capture, end.name) if call.kind in _COMPUTES else []
        )
        if path and path[0].kind in _ROUNDS:
            end = path[0]
        passed.update(later.name for later in path if later.kind in _ROUNDS)
        taken.update(part.name for part in (norm, end) if part is not None)
        grid = _grid_name(call, end, path)
        inputs = tuple(values[name] for name in call.inputs)
        steps.append(Step(call, end.name, inputs, norm, path[-1] if path else None, grid))
        values.update(dict.fromkeys((call.name, end.name, *([norm.name] if norm else [])), end.name))
    return _checked(Plan(tuple(steps), values[capture.output], *_grids(steps)))


def _grids(steps: list[Step]) -> tuple[tuple[str, ...], frozenset[str]]:
    named = {step.grid: step.rounding for step in steps if step.grid is not None}
    fixed = frozenset(name for name, rounding in named.items() if rounding is not None and rounding.kind == "clamp")
    return (INPUT, *named), fixed


def _checked(plan: Plan) -> Plan:
    for step in plan.steps:
        if step.call.kind == "batch_norm" and len(step.call.shape) == 1:
            raise ConversionError(f"{step.call.name} follows no linear layer, so it has no integer form yet")
    return plan


def _grid_name(call: Call, end: Call, path: list[Call]) -> str | None:
    if path:
        return None if path[-1].kind == "quantize" else path[-1].name
    return None if call.kind in _PASSES else end.name


def _sole_reader(capture: Capture, name: str) -> Call | None:
    readers = capture.readers(name)
    return readers[0] if len(readers) == 1 and name != capture.output else None


def _path_to_rounding(capture: Capture, name: str) -> list[Call]:
    """The calls from a value to the last activation that it, and nothing else, goes to; empty if there is none."""
    path: list[Call] = []
    reader = _sole_reader(capture, name)
    while reader is not None and reader.kind in (*_PASSES, *_ROUNDS):
        path.append(reader)
        if reader.kind == "quantize":
            break
        reader = _sole_reader(capture, reader.name)
    while path and path[-1].kind in _PASSES:
        path.pop()
    return path
