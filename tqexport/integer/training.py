"""Integer networks from the start: what training them begins with, and what is rounded once it is over."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from tqexport.errors import UsageError
from tqexport.integer.biases import round_biases
from tqexport.integer.capture import capture_calls
from tqexport.integer.grids import attach_grids, grids_of
from tqexport.integer.plan import plan_of
from tqexport.integer.weights import round_float_layers
from tqexport.model import CheckpointInfo, TruncModel
from tqexport.truncation import WIDTHS, Scheme

__all__ = ["finished", "grids_for_training"]


def grids_for_training(network: nn.Module, widths: Sequence[int], input_shape: Sequence[int], scheme: Scheme) -> None:
    """Put grids into a prepared network, in place; training finds them.

    Args:
        network: See :func:`tqexport.prepare`.
        widths: The weight widths that get grids, 1 to 8.
        input_shape: Shape of one sample, without the batch.
        scheme: The weight quantiser.

    Raises:
        UsageError: There is no integer form of a width or of the weight quantiser, or the network has grids already.
        ConversionError: An operation has no integer form, or the network does not run on such a sample.
    """
    if others := sorted({*widths} - {*WIDTHS}):
        raise UsageError(f"an integer network has weights of 1 to 8 bits; leave {others} out of widths")
    if scheme.bias_correction:
        raise UsageError("weights with bias correction have no integer form; leave out bias_correction or integer=True")
    # A sample in training mode would move the averages of BatchNorms.
    plan = plan_of(capture_calls(copy.deepcopy(network).eval(), tuple(input_shape)))
    attach_grids(network, plan.grids, sorted({*widths}))


def finished(network: nn.Module, info: CheckpointInfo) -> tuple[nn.Module, CheckpointInfo]:
    """A network as integers run it, and its description: what a checkpoint holds.

    The weights of float layers are rounded to int8, and the biases of BatchNorms moved to whole numbers of their sums,
    see :mod:`tqexport.integer.biases`. Doing it again changes nothing.

    Args:
        network: Any network; one without grids is returned as it is. It is not changed.
        info: Its description; the names of its grids need not be in it.

    Raises:
        UsageError: The description has other widths than the grids.
        InputError: A grid was not found yet, or a float layer's weight holds NaN.
        ConversionError: An operation has no integer form.
    """
    grids = grids_of(network)
    if grids is None:
        return network, replace(info, grids=())
    if grids.widths != info.widths:
        raise UsageError(
            f"the network has grids for {_listed(grids.widths)} bits, the description says {_listed(info.widths)}; "
            "prepare it for these widths, or add some with calibrate_batch_norms"
        )
    for bits in grids.widths:
        grids.check_found(bits)
    network = copy.deepcopy(network).eval()
    round_float_layers(network)
    info = replace(info, grids=grids.names)
    for bits in info.widths:
        round_biases(TruncModel(network, info), bits)
    return network, info


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
