"""Reading PyTorch files from strangers: no code is run, and no small file takes gigabytes."""

from __future__ import annotations

import io
import logging
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqexport.errors import InputError, about
from tqexport.reading.archives import check_size, has_checksums, without_checksums
from tqexport.reading.pickles import check_pickle

__all__ = ["checked_state_dict", "read_tensor_file"]

_log = logging.getLogger(__name__)

_LEGACY_PICKLES = 5  # magic number, version, system, the object, and keys of the numbers that follow


def read_tensor_file(path: Path) -> dict[str, Any]:
    """Read a ``.pt`` file (zip or legacy stream) without ever unpickling code.

    Raises:
        InputError: The file is missing, empty, truncated, would run code, unpacks to more than it holds, or does not
            hold a dictionary.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file" if path.exists() else f"{path} does not exist; name a checkpoint file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; copy it again from where it was trained")
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler raises whatever they lead it to
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise InputError(
                f"{path} holds more than tensors and plain values, and loading it could run code; "
                "save its state dict alone and try again"
            ) from error
        raise InputError(f"{path} is not a PyTorch checkpoint, or it is truncated; copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def checked_state_dict(path: Path, state_dict: Any) -> dict[str, Tensor]:
    """A state dict whose tensors are what they claim to be.

    Raises:
        InputError: It is no dictionary of tensors, or one claims more elements than are stored.
    """
    if not isinstance(state_dict, dict) or not state_dict:
        raise InputError(f"{path} holds no state dict")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: {key!r} in the state dict is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise InputError(f"{path}: {key} is a tensor of an unusual kind ({value.layout}, {value.dtype})")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(
                f"{path}: {key} claims {value.numel():,} elements over "
                f"{value.untyped_storage().nbytes():,} bytes; the file is damaged or made to harm"
            )
    return state_dict


def _check_file(path: Path) -> None:
    """Refuse what is damaged or made to harm before anything is built of it.

    Raises:
        InputError: An entry of the archive is not what was written, it unpacks to more than it holds, or its pickle
            makes what is too large.
    """
    with about(f"{path}"):
        try:
            if zipfile.is_zipfile(path):
                _check_archive(path)
                return
            with path.open("rb") as stream:
                for _ in range(_LEGACY_PICKLES):
                    check_pickle(stream)
        except InputError:
            raise
        except Exception as error:  # damage shows as whatever it leads zipfile and pickletools to
            raise InputError("is not a PyTorch checkpoint, or it is truncated; copy it again") from error


def _check_archive(path: Path) -> None:
    """PyTorch stores its archives uncompressed; one that unpacks to more than its size was not written by it."""
    with zipfile.ZipFile(path) as archive:
        check_size(archive, path.stat().st_size)
        if not has_checksums(archive):
            _log.warning(
                "%s was written without checksums (torch.serialization.set_crc32_options): damage to it would not show",
                path,
            )
            without_checksums(archive)
        elif damaged := archive.testzip():  # by the CRC-32 of every entry
            raise InputError(f"is damaged in its part {damaged}; copy it again from where it was trained")
        for name in archive.namelist():
            if name.endswith(".pkl"):
                check_pickle(io.BytesIO(archive.read(name)))
