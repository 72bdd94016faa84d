"""Checkpoints of the research code."""

from __future__ import annotations

from fuzz_checkpoint import ResearchReader
from harness import ROOT

__all__ = ["READER"]


class _Research(ResearchReader):
    name, path = "research checkpoint", ROOT / "tests/data/svhnq.pt"


READER = _Research()
