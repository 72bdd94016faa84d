"""ONNX files: damaged bytes, and well-formed ones with odd fields."""

from __future__ import annotations

from random import Random
from typing import Any

import onnx
from artifacts import ArtifactReader
from harness import ROOT
from mutators import ODD_INTEGERS, mutated_bytes

from tqexport.backends.onnx.integer_form import integer_onnx
from tqexport.integer.names import INTEGER

__all__ = ["READER", "with_odd_field"]

_NAMES = ("", "input", "output", "x", "\x1b[2J", "/etc/passwd", "../outside", "1e999", "[" * 50_000, "[1,2]", "NaN")


class _Onnx(ArtifactReader):
    name, suffix = "onnx", "onnx"

    def corpus(self) -> list[bytes]:
        folder = ROOT / "tests/data"
        files = [path.read_bytes() for path in sorted(folder.glob("v0.1*/*.onnx"))]
        return [*files, integer_onnx(self.integers, 2, INTEGER)]

    def mutated(self, content: bytes, random: Random) -> bytes:
        return with_odd_field(content, random) if random.random() < 0.5 else mutated_bytes(content, random, self.files)


def with_odd_field(content: bytes, random: Random) -> bytes:
    """A file with one to three odd fields."""
    model = onnx.load_from_string(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        message: Any = model
        while True:
            inner = [value for kind, value in message.ListFields() if kind.message_type]
            if not inner or (message is not model and random.random() < 0.25):
                break
            chosen = random.choice(inner)
            message = chosen if hasattr(chosen, "ListFields") else random.choice(list(chosen))
        kind = random.choice(message.DESCRIPTOR.fields)
        try:
            _change(message, kind, random)
        except (TypeError, ValueError):  # the field takes no such value
            continue
    return bytes(model.SerializeToString())


def _change(message: Any, kind: Any, random: Random) -> None:
    repeated = hasattr(getattr(message, kind.name), "append") or hasattr(getattr(message, kind.name), "add")
    if random.random() < 0.15:
        message.ClearField(kind.name)
    elif kind.message_type:
        if repeated:
            values = getattr(message, kind.name)
            if len(values) and random.random() < 0.5:
                del values[random.randrange(len(values))]
            else:
                values.add().CopyFrom(random.choice(list(values) or [values.add()]))
        else:
            getattr(message, kind.name).SetInParent()
    elif repeated:
        values = getattr(message, kind.name)
        if len(values) and random.random() < 0.7:
            values[random.randrange(len(values))] = _odd(values[0], random)
        else:
            values.append(_odd(values[0] if len(values) else 0, random))
    else:
        setattr(message, kind.name, _odd(getattr(message, kind.name), random))


def _odd(value: Any, random: Random) -> Any:
    if isinstance(value, str):
        return random.choice((*_NAMES, value[:-1], value + "x"))
    if isinstance(value, bytes):
        return random.choice((b"", value[:-1], value * 2, b"\xff" * 8, mutated_bytes(value, random)))
    return (
        random.choice((*ODD_INTEGERS[:-2], 0.5, float("nan")))
        if isinstance(value, float)
        else random.choice(ODD_INTEGERS)
    )


READER = _Onnx()
