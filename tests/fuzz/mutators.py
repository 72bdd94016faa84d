"""Hostile inputs from right ones, at random but repeatably."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

__all__ = ["ODD_INTEGERS", "ODD_VALUES", "mutated_bytes", "mutated_value"]

ODD_INTEGERS = (0, 1, -1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 255, 256, 32767, 65535, 65536, 10**5, 2**24, 2**30)
ODD_INTEGERS += (2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**63 - 1, 2**63, 10**30)
_DEEP: Any = "leaf"
for _ in range(60):
    _DEEP = [_DEEP]
ODD_VALUES: tuple[Any, ...] = (
    *ODD_INTEGERS,
    *(None, True, False, "", "x", "\x1b]0;title\x07", "\ud800", "../../outside", "/etc/passwd", "a" * 20_000),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], {"": {}}, [-1], [10**9] * 3, ["x"], [None], _DEEP),
    *({"mean": [0], "std": [0]}, {"mean": [0.5], "std": [float("nan")]}, [1, 2, 4, 8], [8, 8], [0], [9], [2**70]),
)


def mutated_bytes(content: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """A file with one to eight changes: bits, bytes, numbers, and parts that are cut, doubled, moved or of others."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        if not changed:
            break
        place = _place(len(changed), random)
        match random.randrange(9):
            case 0 | 1:
                changed[place] ^= 1 << random.randrange(8)
            case 2:
                changed[place] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 3 | 4:
                layout = random.choice(("<h", "<i", "<i", "<i", "<q"))
                size = struct.calcsize(layout)
                place -= place % random.choice((1, size))
                number = random.choice((*ODD_INTEGERS, random.randrange(len(changed)), -random.randrange(9)))
                mask = (1 << 8 * size) - 1
                changed[place : place + size] = (number & mask).to_bytes(size, "little")
            case 5:
                del changed[place : place + random.choice((1, 2, 4, 16, 256, len(changed)))]
            case 6:
                length = random.choice((1, 4, 16, 256))
                changed[place:place] = changed[place : place + length] * random.choice((1, 2, 50))
            case 7:
                start, length = random.randrange(len(changed)), random.choice((4, 16, 64, 1024))
                changed[place : place + length] = changed[start : start + length]
            case 8:
                other = random.choice(others or (content,))
                start, length = random.randrange(len(other)), random.choice((4, 16, 64, 1024))
                changed[place : place + length] = other[start : start + length]
    return bytes(changed)


def mutated_value(value: Any, random: Random, odd: Sequence[Any] = ODD_VALUES) -> Any:
    """Plain values (dictionaries, lists, leaves) with one of them replaced, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        changed = dict(value)
        key = random.choice(list(changed))
        match random.randrange(12):
            case 0:
                del changed[key]
            case 1:
                changed[random.choice(("x", "", str(key) + "_", "\x1b[2J"))] = changed.pop(key)
            case 2:
                changed[random.choice(list(changed))] = changed[key]
            case _:
                changed[key] = mutated_value(changed[key], random, odd)
        return changed
    if isinstance(value, (list, tuple)) and value and random.random() < 0.8:
        items = list(value)
        place = random.randrange(len(items))
        match random.randrange(8):
            case 0:
                del items[place]
            case 1:
                items[place:place] = [items[place]] * random.choice((1, 3, 40))
            case _:
                items[place] = mutated_value(items[place], random, odd)
        return items
    if isinstance(value, str) and value and random.random() < 0.3:
        return mutated_bytes(value.encode("utf-8", "replace"), random).decode("latin-1")
    return random.choice(odd)


def _place(length: int, random: Random) -> int:
    """A place in a file, more often near its ends, where headers and directories are."""
    near = min(length, random.choice((64, 1024, 4096)))
    return random.choice((random.randrange(length), random.randrange(near), length - 1 - random.randrange(near)))
