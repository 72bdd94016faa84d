"""Pieces of C text: names, comments and arrays."""

from __future__ import annotations

import re
import textwrap

import numpy as np
import numpy.typing as npt

from tqexport.errors import InputError

__all__ = ["COLUMNS", "array", "comment_words", "identifier", "literals", "prefix_of"]

COLUMNS = 110
_TYPES = {"int8": "int8_t", "uint8": "uint8_t", "int32": "int32_t"}


def identifier(name: str) -> str:
    """A name as part of a C identifier: whatever is no ASCII letter or digit becomes an underscore."""
    return re.sub(r"[^0-9A-Za-z]", "_", name)


def prefix_of(stem: str) -> str:
    """What the names of a file's functions and macros begin with.

    Args:
        stem: The name of the file without ``.c``.

    Raises:
        InputError: No C file can include a header of that name.
    """
    if not stem or re.search(r'["\\?/\x00-\x1f]', stem):
        raise InputError(f"{stem!r} is no name that C can include; rename the checkpoint")
    name = identifier(stem)
    return name if name[0].isalpha() else f"net_{name}"


def comment_words(name: str) -> str:
    """A name that is safe in a comment: it neither ends it nor joins its line to the next."""
    return re.sub(r"[^ -~]|[\\?*]", "_", name)


def literals(values: npt.NDArray[np.integer]) -> str:
    """Numbers with commas between them, wrapped."""
    text = ", ".join(map(str, values.ravel().tolist()))
    return textwrap.fill(text, COLUMNS, initial_indent="    ", subsequent_indent="    ")


def array(name: str, values: npt.NDArray[np.integer]) -> str:
    """The definition of a constant array of one dimension, of int8, uint8 or int32."""
    return f"static const {_TYPES[values.dtype.name]} {name}[{values.size}] = {{\n{literals(values)}\n}};\n"
