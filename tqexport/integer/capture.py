"""The calls that a network makes, as a graph: the one place that knows tqexport's layers and torch's functions.

A sample goes through the network once. Modules of a known kind are one call each; so are the functions that a
``forward`` calls between them. Everything else that touches a value of the network is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tqexport.errors import ConversionError, InputError, about
from tqexport.integer.grids import Grids, without_grids
from tqexport.integer.naming import INPUT, NamedCalls
from tqexport.layer_kinds import kind_of
from tqexport.training.layers import SwitchableBatchNorm, SwitchableBatchNorm1d, SwitchableBatchNorm2d
from tqexport.training.quantizers import ActivationQuantizer, Clamp
from tqexport.training.ranges import RangeQuantizer
from tqexport.truncation import FLOAT_BITS

__all__ = ["Call", "Capture", "capture_calls", "norm_of"]


@dataclass(frozen=True)
class Call:
    """One operation of the network.

    Attributes:
        name: Of the operation and of its output.
        kind: ``conv``, ``linear``, ``batch_norm``, ``quantize``, ``clamp``, ``relu``, ``add``, ``cat``, ``mean``,
            ``average_pool``, ``max_pool`` or ``reshape``.
        inputs: Names of the calls it reads, or ``input``.
        shape: Of one sample's output.
        module: The module, where the operation is one.
        options: What a function was called with, by the names the kind defines.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    module: nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Capture:
    """A network as calls in the order they are made.

    Attributes:
        input_shape: Shape of one sample.
        calls: Each reads earlier ones or the input.
        output: The call whose value the network returns.
    """

    input_shape: tuple[int, ...]
    calls: tuple[Call, ...]
    output: str

    def call(self, name: str) -> Call | None:
        """The call of a name; None for the input."""
        return next((call for call in self.calls if call.name == name), None)

    def readers(self, name: str) -> list[Call]:
        """The calls that read a value."""
        return [call for call in self.calls if name in call.inputs]


def capture_calls(network: nn.Module, input_shape: tuple[int, ...]) -> Capture:
    """Run a network once and write down what it does.

    Args:
        network: Set to a width; not changed.
        input_shape: Shape of one sample.

    Raises:
        ConversionError: An operation has no integer form, or the network does not return one of its values.
    """
    sample = torch.zeros((2, *input_shape))
    recorder = _Recorder(network, sample)
    try:
        with torch.no_grad(), without_grids(network), recorder:
            returned = network(sample)
    except (ConversionError, InputError):
        raise
    except Exception as error:  # the network's own code raises whatever it raises
        raise ConversionError(f"the network does not run on a sample of shape {input_shape}: {error}") from error
    if not isinstance(returned, Tensor) or id(returned) not in recorder.names:
        raise ConversionError(
            "the network does not return one tensor that its layers computed; wrap it so that it does"
        )
    return Capture(input_shape, tuple(recorder.calls), recorder.names[id(returned)])


def norm_of(module: nn.Module | None) -> nn.modules.batchnorm._BatchNorm:
    """The BatchNorm that is live at the current width."""
    live = module.current if isinstance(module, SwitchableBatchNorm) else module
    assert isinstance(live, nn.modules.batchnorm._BatchNorm)
    return live


class _Recorder(NamedCalls):
    """Turns calls into :class:`Call`; ``names`` maps the identity of a tensor to the call it came from."""

    def __init__(self, root: nn.Module, sample: Tensor) -> None:
        super().__init__(root)
        self.calls: list[Call] = []
        self.names: dict[int, str] = {id(sample): INPUT}
        self._alive: list[Tensor] = [sample]  # else an identity could be given to another tensor
        self._inside = 0  # how many modules of a known kind are running

    def on_enter(self, module: nn.Module) -> None:
        with about(f"{self._scopes[-1]}:", ConversionError):
            self._inside += _kind_of(module) is not None

    def on_module(self, name: str, module: nn.Module, args: Sequence[Any], output: Any) -> Any:
        """Write a module of a known kind down as one call."""
        kind = _kind_of(module)
        if kind is None:
            return output
        self._inside -= 1
        if self._inside or isinstance(module, Grids):
            return output
        source = self._name_of(args[0] if args else None, name)
        if kind == "same":
            self._alias(output, source)
            return output
        with about(f"{name}:", ConversionError):
            options = _module_options(kind, module)
        self._add(Call(name, kind, (source,), tuple(output.shape[1:]), module, options), output)
        return output

    def on_function(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """Write a function between modules down as a call."""
        if self._inside:
            return output
        tensors = [item for item in _flat((*args, *kwargs.values())) if isinstance(item, Tensor)]
        if not any(id(tensor) in self.names for tensor in tensors):
            return output  # nothing of the sample in it
        called = getattr(function, "__name__", str(function))
        if called in _SAME:
            self._alias(output, self._name_of(tensors[0], name))
            return output
        kind, options = _function_kind(name, called, args, kwargs)
        inputs = tuple(self._name_of(tensor, name) for tensor in tensors)
        if kind == "add" and (len(inputs) != 2 or any(t.shape != output.shape for t in tensors)):
            raise ConversionError(
                f"{name} adds something other than two values of one shape; it has no integer form yet"
            )
        if kind == "reshape" and output.shape[:1] != tensors[0].shape[:1]:
            raise ConversionError(f"{name} moves the batch axis; it has no integer form")
        self._add(Call(name, kind, inputs, tuple(output.shape[1:]), None, options), output)
        return output

    def _add(self, call: Call, output: Tensor) -> None:
        self.calls.append(call)
        self._alias(output, call.name)

    def _alias(self, output: Tensor, name: str) -> None:
        self.names[id(output)] = name
        self._alive.append(output)

    def _name_of(self, value: Any, reader: str) -> str:
        if not isinstance(value, Tensor) or id(value) not in self.names:
            raise ConversionError(
                f"{reader} reads something that no layer before it computed; it has no integer form yet"
            )
        return self.names[id(value)]


_LAYERS = {"Conv1d": "conv", "Conv2d": "conv", "Linear": "linear"}  # by kind of layer
_KINDS: Mapping[type[nn.Module], str] = {
    **dict.fromkeys((SwitchableBatchNorm1d, SwitchableBatchNorm2d, nn.BatchNorm1d, nn.BatchNorm2d), "batch_norm"),
    ActivationQuantizer: "quantize",
    Clamp: "clamp",
    nn.ReLU: "relu",
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d), "max_pool"),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d), "average_pool"),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), "mean"),
    nn.Flatten: "reshape",
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), "same"),
    Grids: "same",
}
_SAME = {"dropout", "dropout2d", "contiguous", "clone", "detach", "to", "float"}
_RESHAPES = {"flatten", "reshape", "view", "squeeze", "unsqueeze"}


def _kind_of(module: nn.Module) -> str | None:
    """The kind of a module; None where what is inside it counts.

    Raises:
        ConversionError: It has no integer form.
    """
    if isinstance(module, RangeQuantizer):
        raise ConversionError("an activation whose range is learned has no integer form yet")
    layer = kind_of(module)
    if layer is not None and layer.name not in _LAYERS:
        raise ConversionError(f"{layer.name} has no integer form yet")
    kind = _LAYERS[layer.name] if layer else _KINDS.get(type(module))
    if kind is None and (type(module).__module__ or "").startswith("torch.nn.modules") and not list(module.children()):
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return None
        raise ConversionError(f"{type(module).__name__} has no integer form")
    if kind in ("quantize", "clamp") and getattr(module, "bits", None) == FLOAT_BITS:
        return "relu"
    return kind


def _module_options(kind: str, module: nn.Module) -> dict[str, Any]:
    if kind == "mean":
        if any(size != 1 for size in _pair(module.output_size)):
            raise ConversionError(f"an adaptive pool to {module.output_size} has no integer form; only to 1")
        return {"keep": True}
    if kind not in ("max_pool", "average_pool"):
        return {}
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "count_include_pad", "divisor_override")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _function_kind(
    name: str, called: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Kind and options of a function that a ``forward`` calls."""
    plain = name.rpartition("/")[2].partition(":")[0]
    if plain in ("add", "relu"):
        if kwargs.get("alpha", 1) != 1:
            raise ConversionError(f"{name} adds a multiple; it has no integer form")
        return plain, {}
    if plain == "cat":
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if axis != 1:
            raise ConversionError(f"{name} joins values along axis {axis}; only axis 1 has an integer form")
        return plain, {}
    if called in _RESHAPES:
        return "reshape", {}
    if plain == "mean":
        axes = kwargs.get("dim", args[1] if len(args) > 1 else ())
        rank = args[0].ndim
        if sorted(axis % rank for axis in _pair(axes)) != list(range(2, rank)) or rank < 3:
            raise ConversionError(
                f"{name} takes the mean over axes {axes}; only that over all of space has an integer form"
            )
        return "mean", {"keep": bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))}
    if plain == "adaptive_average_pool":
        if any(size != 1 for size in _pair(args[1] if len(args) > 1 else kwargs["output_size"])):
            raise ConversionError(f"{name} does not pool to size 1; it has no integer form")
        return "mean", {"keep": True}
    if plain == "average_pool" or called in ("max_pool1d", "max_pool2d"):
        return _pool(called, args, kwargs)
    raise ConversionError(f"{name} calls {called}, which has no integer form")


def _pool(called: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if called.startswith("max"):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    else:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    options = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    options["stride"] = options.get("stride") or options["kernel_size"]
    options.setdefault("padding", 0)
    return ("max_pool" if called.startswith("max") else "average_pool"), options


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (_flat(value) if isinstance(value, (tuple, list)) else [value])]
