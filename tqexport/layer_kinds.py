"""The kinds of layer whose weights can be stored as codes: one row per kind, and nothing else lists them.

A row says which class of ``torch.nn`` it is, which of its parameters multiply, and what the formats make of it.
docs/architecture.md shows how a row is added. Needs no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

__all__ = ["FILTER_OPERATORS", "LAYER_KINDS", "ONNX_OPERATORS", "FilterOperator", "LayerKind", "kind_of"]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: The class in ``torch.nn``.
        parameters: Names of the parameters that multiply, each of which is quantised as a whole. A layer may lack some,
            and a recurrent one has them once for every layer and direction inside it, which ``*`` stands for.
        onnx: The ONNX operators that multiply with it, or look its rows up.
        output_axis: The axis of such a parameter that counts output channels, 0 or 1; the other counts input channels.
    """

    name: str
    parameters: tuple[str, ...]
    onnx: tuple[str, ...]
    output_axis: int = 0

    def parameters_of(self, module: nn.Module) -> tuple[str, ...]:
        """Those of ``parameters`` that a layer of the kind has, quantised or not, or computed before every call."""
        if "_flat_weights_names" in module.__dict__:  # of torch.nn.RNNBase
            own: list[str] = module.__dict__["_flat_weights_names"]
            return tuple(name for name in own if any(fnmatchcase(name, pattern) for pattern in self.parameters))
        return tuple(name for name in self.parameters if module._parameters.get(name, "quantised") is not None)


_RECURRENT = ("weight_ih_l*", "weight_hh_l*", "weight_hr_l*")

LAYER_KINDS = (
    LayerKind("Conv1d", ("weight",), ("Conv",)),
    LayerKind("Conv2d", ("weight",), ("Conv",)),
    LayerKind("Conv3d", ("weight",), ("Conv",)),
    LayerKind("ConvTranspose1d", ("weight",), ("ConvTranspose",), output_axis=1),
    LayerKind("ConvTranspose2d", ("weight",), ("ConvTranspose",), output_axis=1),
    LayerKind("Linear", ("weight",), ("Gemm", "MatMul")),
    LayerKind("Embedding", ("weight",), ("Gather",), output_axis=1),
    LayerKind(
        "MultiheadAttention",  # whose out_proj is a Linear
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        ("Gemm", "MatMul"),
    ),
    LayerKind("LSTM", _RECURRENT, ("LSTM",)),
    LayerKind("GRU", _RECURRENT, ("GRU",)),
    LayerKind("RNN", _RECURRENT, ("Gemm", "MatMul")),  # which is exported step by step
)

ONNX_OPERATORS = frozenset(operator for kind in LAYER_KINDS for operator in kind.onnx)


@dataclass(frozen=True)
class FilterOperator:
    """A TFLite operator that multiplies with a filter, or looks its rows up.

    Attributes:
        torch_axes: For each axis of PyTorch's parameter, the axis of the file's filter that it is.
        axes: The axes of the file's filter in the order output channels, input channels, window.
        data: Where among the operator's inputs its data stand.
        filter: Where its filter stands.
        bias: Where among the operator's inputs its bias stands, if it has one.
        over_all_channels: Whether an output channel reads every input channel of its group; a depthwise one reads one.
        dynamic: Whether a kernel multiplies float data with an int8 filter.
        looks_up: Whether its results are rows of the filter.
    """

    torch_axes: tuple[int, ...]
    axes: tuple[int, ...]
    data: int = 0
    filter: int = 1
    bias: int = 2
    over_all_channels: bool = True
    dynamic: bool = True
    looks_up: bool = False

    @property
    def channel_axis(self) -> int:
        """The axis of the file's filter that counts output channels."""
        return self.axes[0]

    def from_torch(self, weight: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
        """A weight in PyTorch's axis order as the file's filter of a shape, which may have further axes of 1."""
        order = [self.torch_axes.index(axis) for axis in range(len(shape))]
        return weight.reshape([shape[axis] for axis in self.torch_axes]).transpose(order)

    def per_channel(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values per output channel in the shape in which they are multiplied with the file's filter."""
        return values.reshape([-1 if axis == self.channel_axis else 1 for axis in sorted(self.axes)])


FILTER_OPERATORS = {
    "CONV_2D": FilterOperator((0, 3, 1, 2), (0, 3, 1, 2)),
    "CONV_3D": FilterOperator((4, 3, 0, 1, 2), (4, 3, 0, 1, 2), dynamic=False),
    "DEPTHWISE_CONV_2D": FilterOperator((3, 0, 1, 2), (3, 0, 1, 2), over_all_channels=False),
    "FULLY_CONNECTED": FilterOperator((0, 1), (0, 1)),
    "GATHER": FilterOperator((0, 1), (1, 0), data=1, filter=0, over_all_channels=False, dynamic=False, looks_up=True),
    "TRANSPOSE_CONV": FilterOperator((3, 0, 1, 2), (0, 3, 1, 2), data=2, bias=3, dynamic=False),
}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module, also where its parameters are parametrized; None for any other module."""
    from torch import nn

    return next((kind for kind in LAYER_KINDS if isinstance(module, getattr(nn, kind.name))), None)
