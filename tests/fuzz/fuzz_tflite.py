"""TFLite files: damaged bytes, and well-formed ones with odd fields."""

from __future__ import annotations

from random import Random
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from artifacts import ArtifactReader
from harness import ROOT
from mutators import ODD_INTEGERS, mutated_bytes

from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.integer.names import INTEGER, PACKED

__all__ = ["READER", "with_odd_field"]


class _Tflite(ArtifactReader):
    name, suffix = "tflite", "tflite"

    def corpus(self) -> list[bytes]:
        folder = ROOT / "tests/data/v0.1"
        files = [path.read_bytes() for path in sorted(folder.glob("*.tflite"))]
        return files + [integer_tflite(self.integers, 2, kernel) for kernel in (INTEGER, PACKED)]

    def mutated(self, content: bytes, random: Random) -> bytes:
        return with_odd_field(content, random) if random.random() < 0.4 else mutated_bytes(content, random, self.files)


def with_odd_field(content: bytes, random: Random) -> bytes:
    """A file with one to three odd fields, packed again; mutated bytes where they cannot be packed."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for _ in range(random.choice((1, 1, 2, 3))):
        part: Any = model
        if random.random() < 0.9:
            part = random.choice(random.choice((model.subgraphs, model.buffers, model.operatorCodes)) or [model])
        if isinstance(part, schema.SubGraphT) and random.random() < 0.95:
            part = random.choice((part.tensors if random.random() < 0.5 else part.operators) or [part])
        for name in ("quantization", "builtinOptions"):
            if getattr(part, name, None) is not None and random.random() < 0.4:
                part = getattr(part, name)
        name = random.choice([*getattr(part, "__dict__", ())] or ["none"])  # some options have no field, or are odd
        if name == "none":
            continue
        setattr(part, name, _odd(getattr(part, name), random))
    builder = flatbuffers.Builder(1024)
    try:
        builder.Finish(model.Pack(builder), b"TFL3")
    except Exception:  # what cannot be written is no input
        return mutated_bytes(content, random)
    return bytes(builder.Output())


def _odd(value: Any, random: Random) -> Any:
    if isinstance(value, np.ndarray) and value.size:
        changed = value.copy()
        if random.random() < 0.7:
            with np.errstate(all="ignore"):
                changed.flat[random.randrange(value.size)] = np.asarray(random.choice(ODD_INTEGERS[:-4])).astype(
                    value.dtype
                )
            return changed
        return random.choice((changed[:-1], np.repeat(changed, 2), changed[::-1], changed[:0], None))
    if isinstance(value, list):
        return random.choice((value[:-1], value[1:], value * 2, value[::-1], [], None))
    if isinstance(value, (bool, int, float)):
        return random.choice(ODD_INTEGERS)
    return random.choice((None, b"", b"\xff\xfe", "x" * 20_000, "\x1b[2J"))


READER = _Tflite()
