"""What is found when the parameters of a file are compared with what the checkpoint gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from tqexport.facts import ArtifactFacts
from tqexport.integer.names import is_integer

if TYPE_CHECKING:
    from tqexport.backends.graphs import Graph, Match

__all__ = ["REWRITTEN", "Parameters", "different_facts", "matched"]

_WITH_NORMS_FOLDED = 2  # the last form of :func:`matched`
REWRITTEN = "the file was rewritten, to another structure than tqexport gives it"


@dataclass(frozen=True)
class Parameters:
    """How the constants, settings and wiring of a file compare with a fresh export.

    Attributes:
        content: The file; its values named as tqexport names them, where that could be found out.
        differences: By name of the value, a sentence with both values for each that differs.
        not_compared: Why not everything could be compared; None if all of it was.
        folded: Of a file of another structure: the weights whose codes a tool folded into floats, and whose floats are
            those that the checkpoint gives.
    """

    content: bytes
    differences: Mapping[str, str] = field(default_factory=dict)
    not_compared: str | None = None
    folded: Collection[str] = ()

    @property
    def proved(self) -> bool:
        """Whether the file has the parameters that the checkpoint gives, all of them."""
        return self.not_compared is None and not self.differences

    @property
    def verdict(self) -> str:
        """In words: ``equal``, ``differ``, or ``not compared:`` and why."""
        if self.differences:
            return "differ"
        return "equal" if self.not_compared is None else f"not compared: {self.not_compared}"


def matched(fresh: Sequence[Graph], own: Sequence[Graph], facts: ArtifactFacts | None) -> Match | None:
    """Match a file with a fresh export in the first of several forms in which they have the same structure.

    Args:
        fresh: The fresh export as it is; with its constants folded; and, where the format has them, with BatchNorms
            folded into the layers before.
        own: The file likewise.
        facts: What the fresh export says of itself. Numbers of an integer file must be equal to the last bit: its
            levels are, in every runtime, and nothing that rewrites it rounds.
    """
    from tqexport.backends.graphs import FOLDED, STORED, match

    exact = facts is not None and is_integer(facts.kernel)
    for form, (one, two) in enumerate(zip(fresh, own, strict=True)):
        rounding = FOLDED if form == _WITH_NORMS_FOLDED else STORED
        if found := match(one, two, 0.0 if exact else rounding):
            return found
    return None


def different_facts(fresh: ArtifactFacts, own: ArtifactFacts | None) -> dict[str, str]:
    """What a file says of itself otherwise than a fresh export; what it does not say is not wrong."""
    problems = {}
    for entry in fields(ArtifactFacts) if own is not None else ():
        expected, said = getattr(fresh, entry.name), getattr(own, entry.name)
        if said not in (None, (), {}, expected):
            text = f"the file says {said} where the checkpoint gives {expected}"
            problems[entry.name] = f"{entry.name.replace('_', ' ')}: {text}"
    return problems
