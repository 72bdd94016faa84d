"""Integer models of several widths as the same steps on other numbers, for files that hold several widths.

Where values are joined, those on another grid are moved to the grid of the result. At some widths a value may have that
grid already, and then there is nothing to move. Moved all the same it stays as it is, to the last bit, in every
rounding: so the widths get the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tqexport.errors import InputError
from tqexport.integer.model import Concat, Convolution, IntegerModel, Maximum, Operation, Requantize

__all__ = ["alike"]


def alike(networks: Sequence[IntegerModel]) -> list[IntegerModel]:
    """Models of one network at several widths, each with the moves of all.

    Raises:
        InputError: They differ in more than that, and in more than numbers.
    """
    moved = {
        operation.output
        for network in networks
        for operation in network.operations
        if isinstance(operation, Requantize) and any(operation.output not in other.shapes for other in networks)
    }
    same = [_with_moves(network, moved) for network in networks]
    for network in same[1:]:
        _check_alike(same[0], network)
    return same


def _with_moves(network: IntegerModel, moved: set[str]) -> IntegerModel:
    """A model that moves the values named, in front of where they are joined."""
    operations: list[Operation] = []
    shapes, grids = dict(network.shapes), dict(network.grids)
    for operation in network.operations:
        if isinstance(operation, Requantize) and operation.output in moved:
            continue  # comes back below, in the order of the values that are joined
        if isinstance(operation, Concat):
            inputs = []
            for name in operation.inputs:
                source = name.removeprefix(f"{operation.name}/") if name in moved else name
                target = f"{operation.name}/{source}"
                if target in moved:
                    if target not in inputs:
                        operations.append(Requantize(target, (source,), target))
                    shapes[target], grids[target] = network.shapes[source], network.grids[operation.output]
                inputs.append(target if target in moved else name)
            operation = replace(operation, inputs=tuple(inputs))
        operations.append(operation)
    return replace(network, operations=tuple(operations), shapes=shapes, grids=grids)


def _check_alike(first: IntegerModel, other: IntegerModel) -> None:
    """Refuse widths that are not the same steps."""
    for ours, theirs in zip(first.operations, other.operations, strict=False):
        if _structure(first, ours) != _structure(other, theirs):
            raise InputError(
                f"{ours.output} is computed otherwise at {other.bits} bits than at {first.bits}, so one file cannot "
                "hold both; export the widths one by one"
            )
    if len(first.operations) != len(other.operations):
        raise InputError(
            f"{other.bits} bits take other steps than {first.bits}, so one file cannot hold both; export the widths "
            "one by one"
        )


def _structure(network: IntegerModel, operation: Operation) -> tuple[object, ...]:
    """What an operation does, without the numbers that depend on the width."""
    parts: tuple[object, ...] = (type(operation), operation.inputs, operation.output, network.shapes[operation.output])
    match operation:
        case Convolution():
            stored = operation.unsigned if operation.codes is None else operation.codes.codes
            return (*parts, operation.window, operation.groups, operation.codes is None, stored.tobytes())
        case Maximum():
            return (*parts, operation.window)
    return parts
