"""JSON, and values of known types, from files that may hold anything in their place."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from tqexport.errors import InputError
from tqexport.reading import limits

__all__ = [
    "flag",
    "mapping",
    "names",
    "number",
    "numbers",
    "one_of",
    "parse_json",
    "plain",
    "shape",
    "text",
    "texts",
    "whole",
    "wholes",
]

_SHOWN = 40  # characters of a wrong value in a sentence
_HIGHEST = 2**31 - 1


def parse_json(content: bytes | str) -> Any:
    """What a JSON document says.

    Raises:
        InputError: It is no JSON, too large, nested too deeply, or holds numbers that are not finite.
    """
    if len(content) > limits.JSON_BYTES:
        raise InputError(f"is a JSON document of more than {limits.JSON_BYTES:,} bytes; it may be made to harm")
    try:
        return json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # ValueError is what JSON and UTF-8 decoders raise
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"is damaged: {said}") from error


def text(value: Any, name: str) -> str:
    """A string of a length that people read, which can be written anywhere.

    Raises:
        InputError: It is something else, as with all functions here; ``name`` says what it was to be.
    """
    if not isinstance(value, str) or len(value) > limits.TEXT:
        raise _wrong(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise _wrong(name, value, "a text") from error
    return value


def texts(value: Any, name: str) -> tuple[str, ...]:
    """A list of strings."""
    return tuple(text(part, name) for part in _list(value, name))


def names(value: Any, name: str) -> tuple[str, ...]:
    """A list of strings, where numbers may stand for theirs: classes are often numbered."""
    return tuple(str(part) if type(part) is int else text(part, name) for part in _list(value, name))


def whole(value: Any, name: str, low: int = 0, high: int = _HIGHEST) -> int:
    """A whole number in a range; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(name, value, f"a whole number from {low} to {high}")
    return value


def wholes(value: Any, name: str, allowed: Collection[int] | None = None) -> tuple[int, ...]:
    """A list of whole numbers, of the ones that are allowed."""
    values = tuple(whole(part, name) for part in _list(value, name))
    if allowed is not None and not {*values} <= {*allowed}:
        raise _wrong(name, value, f"a list of {', '.join(map(str, sorted(allowed)))}")
    return values


def shape(value: Any, name: str) -> tuple[int, ...]:
    """The shape of a sample: at least one dimension, none of them empty."""
    sizes = tuple(whole(part, name, low=1) for part in _list(value, name))
    if not 0 < len(sizes) <= 8:
        raise _wrong(name, value, "a shape")
    return sizes


def number(value: Any, name: str) -> float:
    """A finite number that float32 holds."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not (isinstance(value, int) or math.isfinite(value)) or abs(value) > 3e38:
        raise _wrong(name, value, "a number")
    return float(value)


def numbers(value: Any, name: str) -> tuple[float, ...]:
    """A list of finite numbers."""
    return tuple(number(part, name) for part in _list(value, name))


def flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def one_of(value: Any, name: str, allowed: Collection[str]) -> str:
    """One of some strings."""
    if not isinstance(value, str) or value not in allowed:
        raise _wrong(name, value, f"one of {', '.join(allowed)}")
    return value


def mapping(value: Any, name: str) -> dict[str, Any]:
    """Values by name."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, value, "values by name")
    return dict(value)


def plain(value: Any, name: str) -> dict[str, Any]:
    """Values by name that consist of numbers, strings, lists and the like, and are few."""
    values, left, waiting = mapping(value, name), limits.ARGUMENTS, [value]
    while waiting:
        part = waiting.pop()
        left -= 1
        if isinstance(part, Mapping):
            waiting += [*part, *part.values()]
        elif isinstance(part, (list, tuple)):
            waiting += part
        elif part is not None and not isinstance(part, (bool, int, float, str)):
            raise InputError(f"{name} hold a {type(part).__name__}, not plain values alone")
        if left < 0 or len(waiting) > limits.ARGUMENTS:
            raise InputError(f"{name} are more than {limits.ARGUMENTS:,} values; they may be made to harm")
    return values


def _list(value: Any, name: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, value, "a list")
    if len(value) > limits.NODES:
        raise InputError(f"{name} is a list of {len(value):,} values; it may be made to harm")
    return value


def _wrong(name: str, value: Any, expected: str) -> InputError:
    """The refusal of a value; numbers and texts are shown, other things by their type."""
    plain = value is None or (isinstance(value, (int, float, str)) and len(str(value)[: _SHOWN + 1]) <= _SHOWN)
    shown = repr(value) if plain else f"a {type(value).__name__}"
    return InputError(f"{name} is {shown}, not {expected}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
