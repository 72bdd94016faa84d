"""What mkdocstrings does not know of our docstrings: names marked as Sphinx does, and ``Example:`` over a doctest."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_LITERAL = re.compile(r"^(.*\S)::$", re.MULTILINE)  # over an indented block, which Markdown takes for code by itself


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Take the roles away, and call an example as griffe does."""
        if obj.docstring:
            value = _EXAMPLE.sub("Examples:", _ROLE.sub(r"`\1`", obj.docstring.value))
            obj.docstring.value = _LITERAL.sub(r"\1:", value.replace("Example::", "For example::"))
