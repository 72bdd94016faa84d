"""The programs of the page that shows how files are used."""

from __future__ import annotations

import re

from places import ROOT

__all__ = ["program"]


def program(language: str, name: str) -> str:
    """The program whose first line has a name in it."""
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    (block,) = [block for block in blocks if name in block.partition("\n")[0]]
    return block
