"""Recurrent layers whose weights are computed.

``torch.nn.RNNBase`` hands its operator a list of weights, ``_flat_weights``, that it made when it was built. A weight
with a parametrization is another tensor at every access, so the list has to be made anew in every call; and what was
computed must not outlive the call, as a tensor with a history can be neither copied nor saved.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["read_weights_in_calls"]


def read_weights_in_calls(module: nn.RNNBase) -> None:
    """Let a recurrent layer compute its weights once in every call, and keep none of them.

    Args:
        module: A layer with a parametrization, whose class is therefore one of its own; that class is changed.
    """
    if module.__dict__.pop("_flat_weights", None) is None:
        return  # that was done for another of its weights
    own: Any = type(module)
    forward = own.forward

    def forward_with_weights(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        with parametrize.cached(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")  # as it is anywhere
            return forward(self, *args, **kwargs)

    own._flat_weights = property(_weights, lambda _self, _list: None)
    own._update_flat_weights = own.flatten_parameters = lambda _self: None
    own.forward = forward_with_weights


def _weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]
