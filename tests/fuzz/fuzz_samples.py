"""Samples in NPZ files: damaged archives, odd arrays, odd headers."""

from __future__ import annotations

import io
import zipfile
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from harness import ROOT, Reader
from mutators import ODD_INTEGERS, mutated_bytes

from tqexport.model import InputInfo
from tqexport.verification.samples import read_samples

__all__ = ["READER"]

_KINDS = ("<f4", "<f8", ">f4", "<i8", "<u1", "<c8", "|b1", "<U3", "|S3", "<M8[s]", "|V8", "|O", "<f2", "<x9")
_TEXTS = ("(1,1,8,8)", "(10**9,1,8,8)", "(-1,1,8,8)", "(1e9,)", "(1,1,8,8", "[1,1,8,8]", "()", "(99999999999999,)")


class _Samples(Reader):
    name = "samples"

    @cached_property
    def right(self) -> bytes:
        """The right file, short."""
        with np.load(ROOT / "fixtures/digits-test.npz") as file:
            stream = io.BytesIO()
            np.savez(stream, inputs=file["inputs"][:20], labels=file["labels"][:20])
        return stream.getvalue()

    def write(self, folder: Path, random: Random) -> Path:
        path = folder / "samples.npz"
        match random.randrange(4):
            case 0:
                path.write_bytes(mutated_bytes(self.right, random))
            case 1:
                path.write_bytes(_with_header(random))
            case 2:
                path.write_bytes(_with_damaged_part(self.right, random))
            case 3:
                np.savez(path, **_arrays(random))
        return path

    def read(self, path: Path) -> None:
        read_samples(path, [InputInfo("input", (1, 8, 8))], [str(number) for number in range(10)])


def _arrays(random: Random) -> dict[str, Any]:
    """Arrays of odd types, shapes and values."""
    count = random.choice((0, 1, 3))
    inputs: Any = np.zeros((count, *random.choice(((1, 8, 8), (8, 8), (1, 8, 9), ()))))
    inputs = inputs.astype(
        random.choice((np.float32, np.float64, np.complex64, np.uint8, bool, "U3", "S3", object, "M8[s]"))
    )
    labels: Any = np.zeros(
        random.choice((count, 0, 7)), random.choice((np.int64, np.uint8, np.float32, np.complex64, "U3"))
    )
    if labels.size and labels.dtype.kind in "iuf" and random.random() < 0.7:
        with np.errstate(all="ignore"):
            labels[0] = np.array(random.choice((*ODD_INTEGERS[:-3], 10, -1))).astype(labels.dtype)
    if inputs.size and inputs.dtype.kind == "f" and random.random() < 0.4:
        inputs.flat[0] = random.choice((np.nan, np.inf, 1e38))
    return {random.choice(("inputs", "inputs", "x")): inputs, random.choice(("labels", "y")): labels}


def _with_header(random: Random) -> bytes:
    """An array whose header says what is not so, stored or compressed."""
    kind, shape = random.choice(_KINDS), random.choice(_TEXTS)
    header = f"{{'descr': '{kind}', 'fortran_order': {random.choice((True, False, 7))}, 'shape': {shape}, }}".encode()
    header = mutated_bytes(header, random) if random.random() < 0.3 else header
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(random.choice((0, 256, 10**6)))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        archive.writestr("inputs.npy", array)
    return stream.getvalue()


def _with_damaged_part(content: bytes, random: Random) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        for name in source.namelist():
            target.writestr(name, mutated_bytes(source.read(name), random))
    return stream.getvalue()


READER = _Samples()
