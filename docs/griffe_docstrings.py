"""What mkdocstrings does not know of our docstrings: names marked as Sphinx does, and ``Example:`` over a doctest."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Take the roles away, and call an example as griffe does."""
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub("Examples:", _ROLE.sub(r"`\1`", obj.docstring.value))
