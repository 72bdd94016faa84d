"""Samples of other sizes than the checkpoint's, for files that leave sizes free."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tqexport.errors import InputError
from tqexport.model import TruncModel, dynamic_sizes
from tqexport.outputs import run_network
from tqexport.verification.samples import Samples, noise

__all__ = ["of_other_sizes"]

_SAMPLES = 3
_CHANGES: tuple[Callable[[int], int], ...] = (
    lambda size: 2 * size,
    lambda size: size // 2,
    lambda size: size - 1,
    lambda size: size + 1,
)


def of_other_sizes(model: TruncModel) -> Samples:
    """Random samples, normalised, of another size along each dynamic axis: the first change that the network takes.

    Raises:
        InputError: It takes none of some.
    """
    names = dynamic_sizes(model.info.signature)
    for change in _CHANGES:
        sizes = {name: change(size) for name, size in names.items()}
        samples = noise(_SAMPLES, [info.resized(sizes) for info in model.info.signature])
        samples = samples.normalized(model.info.normalization)
        try:
            with torch.no_grad(), model.at_width(model.info.widths[0]) as network:
                run_network(network, [torch.from_numpy(values) for values in samples.inputs])
        except (RuntimeError, ValueError, IndexError):  # it does not take this size
            continue
        return samples
    raise InputError(
        f"{' and '.join(names)} may have any size in the file, and the network takes no other than its own"
    )
