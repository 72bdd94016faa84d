"""Walking a pickle's opcodes before anything is built of it: how many there are, how deep and how large what they make.

The unpickler of ``weights_only=True`` runs no code, but builds what it is told: tuples that share parts and have 2^40
leaves, or are a million deep, take all memory or end the process. Nothing is built here, so nothing can.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

from tqexport.errors import InputError
from tqexport.reading import limits

__all__ = ["check_pickle"]


class _Value:
    """Size and depth of what a pickle has made so far."""

    def __init__(self) -> None:
        self.parts = self.depth = 1

    def hold(self, values: list[_Value]) -> None:
        """Take others in."""
        self.parts += sum(value.parts for value in values)
        self.depth = max([self.depth, *(1 + value.depth for value in values)])
        if self.parts > limits.PICKLE_PARTS or self.depth > limits.PICKLE_DEPTH:
            raise InputError("holds objects that are nested too deeply or too often; it may be made to harm")


def check_pickle(stream: IO[bytes]) -> None:
    """Walk one pickle, up to its end.

    Raises:
        InputError: It is too long, or makes what is too deep or too large.
        ValueError: It is damaged (as does ``IndexError`` or ``KeyError``).
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[Any, _Value] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > limits.PICKLE_OPCODES:
            raise InputError(f"describes more than {limits.PICKLE_OPCODES:,} objects; it may be made to harm")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = _top(stack)
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            stack.append(None)
        elif opcode.name == "DUP":
            stack.append(_top(stack))
        else:
            _apply(opcode, stack)


def _apply(opcode: pickletools.OpcodeInfo, stack: list[_Value | None]) -> None:
    """Take from the stack what an opcode takes, and put what it makes in its place."""
    taken: list[_Value] = []
    before = list(opcode.stack_before)
    if pickletools.markobject in before:
        while (value := stack.pop()) is not None:
            taken.append(value)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(_top(stack))
        stack.pop()
    if not opcode.stack_after:
        return
    # Lists, dictionaries and objects that are filled stay the same ones, which the memo knows.
    filled = opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
    result = taken.pop() if filled else _Value()
    result.hold(taken)
    stack.append(result)


def _top(stack: list[_Value | None]) -> _Value:
    """What lies on top of the stack."""
    value = stack[-1]
    if value is None:
        raise ValueError("a mark where a value was expected")
    return value
