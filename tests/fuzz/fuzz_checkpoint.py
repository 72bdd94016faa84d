"""Native checkpoints: damaged archives, odd entries, and pickles of many kinds in archives that are whole."""

from __future__ import annotations

import io
import pickle
import zipfile
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from harness import ROOT, Reader
from mutators import ODD_VALUES, mutated_bytes, mutated_value
from torch import Tensor

from tqexport import load_checkpoint
from tqexport.outputs import zeros_for

__all__ = ["READER", "ResearchReader", "pickled", "with_odd_entries"]


class _Executes:
    """A pickle of it asks to write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('executed', 'w').close()",)


def odd_tensors() -> list[Any]:
    """Tensors of kinds that no checkpoint holds."""
    one = torch.zeros(2)
    return [
        *(one, one.to(torch.complex64), one.to_sparse(), torch.zeros(2, device="meta"), torch.zeros((0, 3))),
        *(
            torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
            one.double(),
            one.bool(),
            torch.full((2,), float("nan")),
        ),
        *(torch.zeros(1).expand(10**6), torch.zeros(1).as_strided((10**9,), (0,)), torch.full((2,), 1e38)),
    ]


class ResearchReader(Reader):
    """A file of PyTorch, read as a checkpoint."""

    name: str
    path: Path

    @cached_property
    def content(self) -> dict[str, Any]:
        """The right file's entries."""
        loaded: dict[str, Any] = torch.load(self.path, weights_only=True)
        return loaded

    @cached_property
    def odd(self) -> tuple[Any, ...]:
        """Entries of types that no checkpoint holds."""
        return (*ODD_VALUES, *odd_tensors())

    def write(self, folder: Path, random: Random) -> Path:
        path, right = folder / "ckpt.pt", self.path.read_bytes()
        match random.randrange(5):
            case 0:
                path.write_bytes(mutated_bytes(right, random))
            case 1:
                path.write_bytes(_with_part(right, random))
            case 2:
                path.write_bytes(_with_pickle(right, pickled(random), random))
            case _:
                torch.save(
                    with_odd_entries(self.content, random, self.odd),
                    path,
                    _use_new_zipfile_serialization=random.random() < 0.9,
                )
        return path

    def read(self, path: Path) -> None:
        model = load_checkpoint(path)
        with torch.no_grad(), model.at_width(model.info.widths[-1]) as network:
            network(*zeros_for(model.info.signature, 1))


def with_odd_entries(content: dict[str, Any], random: Random, odd: tuple[Any, ...]) -> dict[str, Any]:
    """A checkpoint's entries with one or two that are odd."""
    changed: dict[str, Any] = content
    for _ in range(random.choice((1, 1, 2))):
        entry = random.choice(list(changed))
        state = changed.get("state_dict")
        if random.random() < 0.3 and isinstance(state, dict) and state:
            key = random.choice(list(state))
            changed = {**changed, "state_dict": {**state, key: _odd_tensor(state[key], random, odd)}}
        elif isinstance(changed[entry], Tensor):
            changed = {**changed, entry: _odd_tensor(changed[entry], random, odd)}
        elif isinstance(changed[entry], dict) and any(isinstance(value, Tensor) for value in changed[entry].values()):
            changed = {**changed, entry: random.choice(odd)} if random.random() < 0.1 else changed
        else:
            changed = {**changed, entry: mutated_value(changed[entry], random, odd)}
    return changed


_MOST_NUMBERS = 10_000_000  # to compute with; one of the odd tensors says that it has 10^9


def _odd_tensor(value: Any, random: Random, odd: tuple[Any, ...]) -> Any:
    numbers = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    if not numbers or random.random() < 0.4 or value.numel() > _MOST_NUMBERS:
        return random.choice(odd)
    choices = (
        value * 1e38,
        value * 0,
        value * 1e-45,
        value[..., :-1] if value.ndim else value,
        value[None],
        value.to(torch.int64),
    )
    return random.choice((*choices, value + float("inf"), -value.abs()))


def pickled(random: Random) -> bytes:
    """A pickle that is deep, long, shared, in a circle, would run code, or is damaged."""
    size = random.choice((10, 1_000, 100_000))
    shared: Any = ("leaf",)
    for _ in range(random.randrange(60)):
        shared = (shared, shared)
    circle: list[Any] = []
    circle.append(circle)
    kinds: tuple[bytes, ...] = (
        pickle.dumps({"format": _Executes()}, 2),
        pickle.dumps({"format": "tqexport", "arguments": _Executes()}, 2),
        b"\x80\x02cos\nsystem\nX\x10\x00\x00\x00touch executed;  \x85R.",
        b"\x80\x02c__builtin__\neval\n(X\x1c\x00\x00\x00open('executed','w').close() tR.",
        pickle.dumps({"format": shared}, 2),
        pickle.dumps(circle, 2),
        b"\x80\x02" + b"]" * size + b"a" * (size - 1) + b".",
        b"\x80\x02K\x01" + b"\x85" * size + b".",
        b"\x80\x02(" + b"K\x01" * size + b"l.",
        b"\x80\x02}" + b"q\x00h\x00" * size + b".",
        b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
        b"\x80\x02X\xff\xff\xff\x7f" + b"a" * size + b".",
        bytes(random.randrange(256) for _ in range(random.randrange(1, 200))),
    )
    chosen = random.choice(kinds)
    return mutated_bytes(chosen, random) if random.random() < 0.4 else chosen


def _with_pickle(content: bytes, replaced: bytes, random: Random) -> bytes:
    """The archive with another pickle in it, or the pickle alone, as old files were."""
    if random.random() < 0.3:
        return replaced
    return _rewritten(content, {"data.pkl": replaced})


def _with_part(content: bytes, random: Random) -> bytes:
    """The archive with one damaged part and right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = random.choice([*archive.namelist(), *(name for name in archive.namelist() if name.endswith("data.pkl"))])
        part = archive.read(name)
    return _rewritten(
        content, {name: mutated_bytes(part, random)}, random.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    )


def _rewritten(content: bytes, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w", compression) as target:
        for name in source.namelist():
            replaced = next((value for end, value in parts.items() if name.endswith(end)), None)
            target.writestr(name, source.read(name) if replaced is None else replaced)
    return stream.getvalue()


class _Checkpoint(ResearchReader):
    name, path = "checkpoint", ROOT / "fixtures/digits-resnet8.pt"


class _Integers(ResearchReader):
    name, path = "checkpoint with grids", ROOT / "fixtures/digits-resnet8-int.pt"


READER = _Checkpoint()
INTEGERS = _Integers()
