"""The kinds of layer whose weights can be stored as codes: one row per kind, and nothing else lists them.

A row says which class of ``torch.nn`` it is, which of its parameters multiply, and what the formats make of it.
docs/architecture.md shows how a row is added. Needs no framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FILTER_OPERATORS", "LAYER_KINDS", "ONNX_OPERATORS", "FilterOperator", "LayerKind", "kind_of"]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: The class in ``torch.nn``.
        parameters: Names of the parameters that multiply, each of which is quantised as a whole.
        channel_axis: The axis of such a parameter that counts output channels (of one group).
        onnx: The ONNX operators that multiply with it, always as their second input.
    """

    name: str
    parameters: tuple[str, ...]
    channel_axis: int
    onnx: tuple[str, ...]


LAYER_KINDS = (
    LayerKind("Conv1d", ("weight",), 0, ("Conv",)),
    LayerKind("Conv2d", ("weight",), 0, ("Conv",)),
    LayerKind("Linear", ("weight",), 0, ("Gemm", "MatMul")),
)

ONNX_OPERATORS = frozenset(operator for kind in LAYER_KINDS for operator in kind.onnx)


@dataclass(frozen=True)
class FilterOperator:
    """A TFLite operator that multiplies with a filter.

    Attributes:
        axes: Which axis of the file's filter each axis of PyTorch's parameter is.
        channel_axis: The axis of the file's filter that counts output channels.
        over_all_channels: Whether an output channel may read every input channel; a depthwise one reads its own.
        slots: Where among the operator's inputs the data, the filter and the bias stand.
    """

    axes: tuple[int, ...]
    channel_axis: int
    over_all_channels: bool = True
    slots: tuple[int, int, int] = (0, 1, 2)

    @property
    def torch_channel_axis(self) -> int:
        """The axis of PyTorch's parameter that counts output channels."""
        return self.axes.index(self.channel_axis)


FILTER_OPERATORS = {
    "CONV_2D": FilterOperator((0, 3, 1, 2), 0),
    "DEPTHWISE_CONV_2D": FilterOperator((3, 0, 1, 2), 3, over_all_channels=False),
    "FULLY_CONNECTED": FilterOperator((0, 1), 0),
}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module, also where its parameters are parametrized; None for any other module."""
    from torch import nn

    return next((kind for kind in LAYER_KINDS if isinstance(module, getattr(nn, kind.name))), None)
