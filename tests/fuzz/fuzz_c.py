"""C files: what they say of themselves and their tables; none is compiled that is not what tqexport writes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from artifacts import ArtifactReader
from mutators import mutated_bytes, mutated_value

from tqexport.artifacts.truncate import open_artifact
from tqexport.backends.c.reading import FACTS
from tqexport.backends.c.source import render_c
from tqexport.facts import facts_of_model
from tqexport.integer.build import integer_model
from tqexport.integer.names import INTEGER

__all__ = ["READER"]


class _C(ArtifactReader):
    name, suffix = "c", "c"

    def corpus(self) -> list[bytes]:
        facts = facts_of_model(self.integers, 2, "channels last", INTEGER)
        return [render_c([integer_model(self.integers, 2)], "net", facts).source.encode()]

    def mutated(self, content: bytes, random: Random) -> bytes:
        if random.random() < 0.5:
            return mutated_bytes(content, random)
        before, _, rest = content.decode().partition(FACTS)
        line, _, after = rest.partition("\n")
        return f"{before}{FACTS}{json.dumps(mutated_value(json.loads(line), random))}\n{after}".encode(
            "utf-8", "replace"
        )

    def read(self, path: Path) -> None:
        artifact = open_artifact(path)
        artifact.backend.describe(artifact.content)
        artifact.backend.codes(artifact.content, artifact.own or artifact.widths[-1])


READER = _C()
