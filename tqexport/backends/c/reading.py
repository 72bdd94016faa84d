"""Reading a C file of tqexport back: what it says of itself, and its tables. Like a device, it needs numpy alone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from tqexport.backends.packing import unpacked
from tqexport.errors import InputError
from tqexport.facts import DAMAGED
from tqexport.reading import records
from tqexport.reading.records import mapping, parse_json
from tqexport.truncation import STORED_BITS

__all__ = ["FACTS", "FORMAT", "MAGIC", "record_of", "stem_of", "stored_codes"]

MAGIC = "/* A TruncQuant network in integers, written by tqexport."  # begins every file
FORMAT = 1  # of the text; another one is another number
FACTS = "tqexport: "  # begins the line of the head that holds the facts

_FACTS_LINE = re.compile(rf"^ \* {re.escape(FACTS)}(\{{.*\}})$", re.MULTILINE)
_INCLUDE = re.compile(r'^#include "(.*)\.h"$', re.MULTILINE)


def record_of(content: bytes) -> dict[str, Any]:
    """What a file says of itself, by key.

    Raises:
        InputError: It is damaged, or another version of tqexport wrote it.
    """
    line = _FACTS_LINE.search(_text(content))
    if line is None or not content.startswith(MAGIC.encode()):
        raise InputError(DAMAGED)
    record = mapping(parse_json(line[1]), "the record in front of it")
    if record.get("format") != FORMAT:
        raise InputError("was written by another version of tqexport; export it again")
    return record


def stem_of(content: bytes) -> str:
    """The name that the file was written under, without ``.c``.

    Raises:
        InputError: It is damaged.
    """
    line = _INCLUDE.search(_text(content))
    if line is None:
        raise InputError(DAMAGED)
    return line[1]


def stored_codes(content: bytes) -> dict[str, npt.NDArray[np.uint8]]:
    """The codes in the file by weight name, uint8 in PyTorch's shape: as they are stored, unpacked where packed.

    Raises:
        InputError: It is damaged.
    """
    text, codes = _text(content), {}
    try:
        for name, (identifier, shape, bits) in record_of(content)["weights"].items():
            definition = re.search(
                rf"^static const uint8_t {re.escape(identifier)}\[\d+\] = \{{([^}}]*)\}};", text, re.M
            )
            if definition is None:
                raise InputError(DAMAGED)
            numbers = np.array([int(number) for number in definition[1].split(",")], np.uint8)
            out, inside, *kernel = records.shape(shape, name)
            rows = numbers.reshape(out, -1)
            if records.whole(bits, name, low=1, high=STORED_BITS) != STORED_BITS:
                rows = unpacked(rows, bits, inside * int(np.prod(kernel)))
            codes[name] = np.moveaxis(rows.reshape(out, *kernel, inside), -1, 1)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(DAMAGED) from error
    return codes


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(DAMAGED) from error
