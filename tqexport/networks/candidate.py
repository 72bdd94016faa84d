"""A network that was never trained or saved: what a factory builds, prepared where it is not prepared yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tqexport.errors import InputError, TqExportError, UsageError, said_in_a_line
from tqexport.model import CheckpointInfo, InputInfo, TruncModel
from tqexport.networks.registry import find_factory
from tqexport.training.layers import switchable_batch_norms
from tqexport.training.preparation import prepare
from tqexport.training.quantizers import quantized_weights

__all__ = ["Candidate", "build_candidate"]

DEFAULT_WIDTHS = (2, 8)


@dataclass(frozen=True)
class Candidate:
    """A network that was never trained.

    Attributes:
        model: The network, prepared, with the weights that its factory gave it.
        prepared_here: Whether the factory built a float network, which was prepared for the occasion.
        float_layers: What was named to stay in float; None where that was left to :func:`tqexport.prepare`.
    """

    model: TruncModel
    prepared_here: bool
    float_layers: frozenset[str] | None = None


def build_candidate(
    factory: str,
    arguments: Mapping[str, Any],
    inputs: Sequence[int] | Sequence[InputInfo],
    widths: Sequence[int] = (),
    float_layers: Collection[str] | None = None,
) -> Candidate:
    """Build a network, and prepare it if its factory did not.

    Args:
        factory: ``package.module:factory`` or a registered name; its code runs, with the random numbers of seed 0. It
            returns the network, or the network and what it takes.
        arguments: Keyword arguments of the factory.
        inputs: What the network takes; empty where the factory says it.
        widths: Widths to look at. Default: those of the BatchNorms that a prepared network has, else 2 and 8.
        float_layers: Layers that stay in float, as :func:`tqexport.prepare` takes them.

    Raises:
        UsageError: The factory cannot be imported, nothing says what the network takes, or the network was prepared by
            its factory for other widths or with other float layers.
        InputError: The factory fails, or returns something else than a network.
    """
    build = find_factory(factory)
    torch.manual_seed(0)
    try:
        returned: Any = build(**arguments)
    except TqExportError:
        raise
    except Exception as error:  # a factory may be the user's own code: whatever it raises is about the network
        raise InputError(f"building {factory} failed: {said_in_a_line(error)}") from error
    network, said = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, ())
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{factory} returned a {type(network).__name__}; let it return an nn.Module, or one and its inputs"
        )
    if not inputs and not said:
        raise UsageError(
            "nothing says what the network takes; add --input-shape 3,32,32 for one float32 input, --input "
            "NAME:DTYPE:SHAPE for each of several, or let the factory return (network, inputs)"
        )
    prepared_here = not quantized_weights(network)
    if prepared_here:
        widths = tuple(widths) or DEFAULT_WIDTHS
        network = prepare(network, widths, float_layers=float_layers)
    else:
        if float_layers is not None:
            raise UsageError(f"{factory} returns a prepared network; name its float layers in there")
        widths = _widths_of(factory, network, widths)
    scheme = next(iter(quantized_weights(network).values())).scheme
    info = CheckpointInfo(factory, dict(arguments), tuple(inputs or said), tuple(widths), scheme)
    named = None if float_layers is None else frozenset(float_layers)
    return Candidate(TruncModel(network.eval(), info), prepared_here, named)


def _widths_of(factory: str, network: nn.Module, asked: Sequence[int]) -> tuple[int, ...]:
    """The widths to look at of a network that was prepared for some."""
    norms = [set(norm.widths) for norm in switchable_batch_norms(network).values()]
    if not norms:
        return tuple(asked) or DEFAULT_WIDTHS
    has = sorted(set.intersection(*norms) & set(range(1, 9)))
    if not has or (missing := sorted(set(asked) - set(has))):
        lacking = ", ".join(map(str, missing if has else asked)) or "1 to 8"
        raise UsageError(
            f"{factory} returns a network that has no BatchNorm for {lacking} bits; it has {', '.join(map(str, has))}"
        )
    return tuple(asked) or tuple(has)
