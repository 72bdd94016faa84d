"""A back end that the tests alone register: it writes the codes as they are, and nothing runs its files.

8 bytes that say what it is, 4 bytes length of the head, the head in JSON, the codes of each weight one after another
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tqexport.backends.base import EXACT, Backend, Source, TensorInfo
from tqexport.deploy import stored_weights
from tqexport.errors import InputError
from tqexport.facts import Facts, decode, encode, facts_of_model

__all__ = ["RawBackend"]

MAGIC = b"TQCODES\n"


class RawBackend(Backend):
    """Codes in a file of their own."""

    name = "raw"
    title = "Raw"
    layout = "channels first"
    description = "Writes NAME-wB.raw for each width B."

    def export(
        self,
        source: Source,
        widths: Sequence[int],
        kernel: str = EXACT,  # noqa: ARG002
        batch: int | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[int, bytes]]:
        for bits in widths:
            weights = stored_weights(source.model, bits)
            codes = {name: (weight.codes >> weight.shift).numpy() for name, weight in weights.items()}
            head = {
                "facts": encode(facts_of_model(source.model, bits, self.layout)),
                "input_shape": source.model.info.input_shape,
                "weights": {name: value.shape for name, value in codes.items()},
            }
            described = json.dumps(head, sort_keys=True).encode()
            body = b"".join(codes[name].tobytes() for name in sorted(codes))
            yield bits, MAGIC + len(described).to_bytes(4, "little") + described + body

    def recognises(self, content: bytes) -> bool:
        return content.startswith(MAGIC)

    def describe(self, content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        head, _ = _parts(content)
        return (TensorInfo("input", "float32", ("batch", *head["input_shape"])),), ()

    def facts(self, content: bytes) -> Facts:
        return decode(_parts(content)[0]["facts"])

    def codes(self, content: bytes, bits: int) -> dict[str, list[Any]]:  # noqa: ARG002 - of one width
        head, body = _parts(content)
        sizes = {name: int(np.prod(shape)) for name, shape in sorted(head["weights"].items())}
        if sum(sizes.values()) != len(body):
            raise InputError("the Raw file is truncated")
        codes, start = {}, 0
        for name, size in sizes.items():
            codes[name] = [np.frombuffer(body[start : start + size], np.uint8).reshape(head["weights"][name])]
            start += size
        return codes


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The head and the codes of a file."""
    start = len(MAGIC) + 4
    length = int.from_bytes(content[len(MAGIC) : start], "little")
    try:
        return json.loads(content[start : start + length]), content[start + length :]
    except ValueError as error:
        raise InputError("the Raw file is damaged") from error
