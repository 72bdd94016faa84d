"""Native checkpoints without pickle: safetensors with a record in JSON, the float weights, and their codes.

The metadata of the file has one entry, ``tqexport``: a JSON document with the ``checkpoint``, what a native ``.pt``
file says of itself in the same words, and ``sha256``, the hash of that record and of every tensor. The tensors are
those of the state dict, and the uint8 codes of each quantised weight as ``NAME.codes``; ``NAME.codes.wB`` where every
width has codes of its own. Files of others (tensors alone) are read as state dicts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqexport.errors import InputError, UsageError
from tqexport.reading.files import read_bytes
from tqexport.truncation import STORED_BITS

__all__ = ["is_safetensors", "read_safetensors", "safetensors_bytes"]

_ENTRY = "tqexport"
_LARGEST_HEADER = 16 << 20  # bytes; a hundred thousand tensors
_LENGTH = 8  # bytes in front of the header that say how long it is, little-endian

Codes = Mapping[str, Mapping[int, Tensor]]


def is_safetensors(path: Path) -> bool:
    """Whether a file's first bytes are those of safetensors: a length, and the JSON object that it is the length of."""
    try:
        with path.open("rb") as stream:
            return stream.read(_LENGTH + 1)[_LENGTH:] == b"{"
    except OSError:
        return False


def safetensors_bytes(record: Mapping[str, Any], state_dict: Mapping[str, Tensor], codes: Codes) -> bytes:
    """The content of a native checkpoint.

    Args:
        record: What it says of itself, plain values.
        state_dict: Tensors by key.
        codes: By name of a quantised weight and by width, uint8 in the shape of the weight: the stored codes at 8 bits
            alone, or those of every width where none can be shifted to another.

    Raises:
        UsageError: The record holds what JSON cannot, or would give back as something else.
    """
    from safetensors.torch import save

    named = {_key(name, bits, own): value for name, own in codes.items() for bits, value in own.items()}
    # safetensors refuses tensors that share memory, as tied weights do.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in {**state_dict, **named}.items()}
    arguments = record["arguments"]
    try:
        plain = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the description of the network holds what JSON cannot: {error}; write a .pt file") from error
    if plain["arguments"] != arguments:
        raise UsageError(
            f"JSON would change the arguments {arguments}; use lists and names as keys, or write a .pt file"
        )
    document = {"checkpoint": plain, "sha256": _sha256(plain, tensors)}
    # One entry: safetensors writes several in an order that changes from run to run.
    return save(tensors, {_ENTRY: json.dumps(document)})


def read_safetensors(path: Path) -> tuple[dict[str, Any], Codes | None]:
    """Read a safetensors file.

    Returns:
        What it says of itself, as a ``.pt`` file has it, ``state_dict`` included; and the codes of a native checkpoint.

    Raises:
        InputError: It is damaged, or not what was written.
    """
    damaged = f"{path} is a damaged safetensors file"
    content = read_bytes(path)
    length = int.from_bytes(content[:_LENGTH], "little")
    if length > min(_LARGEST_HEADER, len(content) - _LENGTH):
        raise InputError(f"{damaged}, its header claims {length:,} bytes; copy it again")
    try:
        metadata = json.loads(content[_LENGTH : _LENGTH + length]).get("__metadata__", {})
        tensors = _tensors(content)
        if _ENTRY not in metadata:
            return {"state_dict": tensors}, None
        document = json.loads(metadata[_ENTRY], parse_constant=_refuse)
        record, sha256 = document["checkpoint"], document["sha256"]
        true = _sha256(record, tensors)
        codes = _take_codes(record["quantized"], record["widths"], tensors)
    except Exception as error:  # damage shows as whatever it leads json and safetensors to
        raise InputError(f"{damaged}; copy it again from where it was written ({type(error).__name__})") from error
    if sha256 != true:
        raise InputError(f"{damaged}: its sha256 is not that of what it holds; copy it again from where it was written")
    return {**record, "state_dict": tensors}, codes


def _tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a file, by name; whatever is wrong with it is raised as it is."""
    from safetensors.torch import load

    return load(content)


def _take_codes(names: Any, widths: Any, tensors: dict[str, Tensor]) -> Codes:
    """Take the codes from the tensors, so that those of the state dict are left."""
    codes: dict[str, dict[int, Tensor]] = {}
    for name in names:
        if f"{name}.codes" in tensors:
            codes[name] = {STORED_BITS: tensors.pop(f"{name}.codes")}
        else:
            codes[name] = {bits: tensors.pop(f"{name}.codes.w{bits}") for bits in widths}
        if any(value.dtype != torch.uint8 for value in codes[name].values()):
            raise TypeError(f"the codes of {name} are no bytes")
    return codes


def _key(name: str, bits: int, codes: Mapping[int, Tensor]) -> str:
    """What the codes of a weight are called in the file."""
    return f"{name}.codes" if [*codes] == [STORED_BITS] else f"{name}.codes.w{bits}"


def _sha256(record: Any, tensors: Mapping[str, Tensor]) -> str:
    """Hash of a record and its tensors, whatever their order, hex."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
