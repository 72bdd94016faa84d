"""Where values lie in memory while the network runs: one arena that they share.

Values that are never needed at the same time may lie in the same place. The planner is greedy by size (Pisarchyk and
Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 5.2; TFLite Micro's is the same): the
largest value first, each at the lowest place where nothing lies that is needed at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tqexport.integer.model import Add, IntegerModel, Operation, Requantize, Reshape
from tqexport.integer.naming import INPUT

__all__ = ["Block", "blocks_of", "buffers_of", "is_reordered", "last_readers", "place"]

_ALIGNMENT = 2  # bytes; windows hold int16


@dataclass(frozen=True)
class Block:
    """Some bytes that are needed for a while.

    Attributes:
        size: In bytes.
        first: The first operation that needs them, by number.
        last: The last one.
    """

    size: int
    first: int
    last: int


def place(blocks: Mapping[str, Block]) -> tuple[dict[str, int], int]:
    """The offset of each block in the arena, by name, and the size of the arena; both even numbers of bytes."""
    offsets: dict[str, int] = {}
    total = 0
    for name in sorted(blocks, key=lambda name: (-blocks[name].size, blocks[name].first, name)):
        block, offset = blocks[name], 0
        taken = [
            (offsets[other], offsets[other] + blocks[other].size)
            for other in offsets
            if blocks[other].first <= block.last and block.first <= blocks[other].last
        ]
        for start, end in sorted(taken):
            if offset + block.size <= start:
                break
            offset = max(offset, -(-end // _ALIGNMENT) * _ALIGNMENT)
        offsets[name] = offset
        total = max(total, offset + block.size)
    return offsets, -(-total // _ALIGNMENT) * _ALIGNMENT


def buffers_of(network: IntegerModel) -> dict[str, str]:
    """The value in whose bytes each value lies, by name: its own, or that of an input that it takes the place of.

    A reshape that reorders nothing is its input. A sum, and a move to another grid, may write over an input that
    nothing reads any more.
    """
    last = last_readers(network.operations, network.output)
    buffers = {INPUT: INPUT}
    for number, operation in enumerate(network.operations):
        buffers[operation.output] = operation.output
        if isinstance(operation, Reshape) and not is_reordered(network, operation):
            buffers[operation.output] = buffers[operation.inputs[0]]
        elif isinstance(operation, (Add, Requantize)):
            for name in operation.inputs:
                sharing = [value for value, buffer in buffers.items() if buffer == buffers[name]]
                if buffers[name] != INPUT and all(last[value] <= number for value in sharing):
                    buffers[operation.output] = buffers[name]
                    break
    return buffers


def last_readers(operations: Sequence[Operation], output: str) -> dict[str, int]:
    """The number of the last operation that reads each value; the output is read after all of them."""
    last: dict[str, int] = {INPUT: -1}
    for number, operation in enumerate(operations):
        last.setdefault(operation.output, number)
        last.update(dict.fromkeys(operation.inputs, number))
    last[output] = len(operations)
    return last


def blocks_of(network: IntegerModel, buffers: Mapping[str, str], outside: Collection[str]) -> dict[str, Block]:
    """The blocks of all buffers that do not lie outside of the arena, in the caller's memory."""
    last = last_readers(network.operations, network.output)
    written = {operation.output: number for number, operation in enumerate(network.operations)}
    blocks = {}
    for buffer in dict.fromkeys(buffers.values()):
        if buffer in outside:
            continue
        values = [value for value, own in buffers.items() if own == buffer]
        blocks[buffer] = Block(prod(network.shapes[buffer]), written[buffer], max(last[value] for value in values))
    return blocks


def is_reordered(network: IntegerModel, operation: Reshape) -> bool:
    """Whether a reshape moves levels about: it does where channels last is another order than channels first."""
    shapes = [network.shapes[name] for name in (operation.inputs[0], operation.output)]
    different = prod(shapes[0][1:]) != prod(shapes[1][1:])
    return different and any(channels > 1 and prod(space) > 1 for channels, *space in shapes)
