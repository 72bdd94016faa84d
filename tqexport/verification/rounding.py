"""How far float32 rounding may take one right computation of a network from another.

Beside each tensor runs the variance of its rounding error; :mod:`tqexport.verification.rounding_rules` has what each
operator does to it, and :mod:`tqexport.verification.choices` where a whole number may be another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from tqexport.verification.choices import CHOICES
from tqexport.verification.rounding_rules import MARGIN, RULES, UNIT, moved, tensors_of, tried

__all__ = ["Call", "RoundingErrors"]

_SMALLEST = torch.finfo(torch.float32).tiny  # variance of what is too small for its variance to be a float32


class RoundingErrors(TorchDispatchMode):
    """Within the block, what is computed from an :meth:`exact` tensor has a rounding error.

    Example:
        >>> with torch.no_grad(), RoundingErrors() as errors:
        ...     y = torch.nn.functional.linear(errors.exact(torch.ones(1, 64)), torch.ones(1, 64))
        >>> 0 < errors.bound(y).item() < 1e-3
        True
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._variances: Any = WeakIdKeyDictionary()  # float32, the shape of its tensor
        self._whole: Any = WeakIdKeyDictionary()  # whole numbers that depend on an exact tensor
        self._layers: Any = WeakIdKeyDictionary()  # names given to mark()
        self._random = torch.Generator().manual_seed(0)

    def exact(self, value: Tensor) -> Tensor:
        """Mark a tensor as the same in both computations; returns it."""
        self._variances[value] = torch.zeros_like(value)
        self._layers[value] = ()
        return value

    def rounded(self, value: Tensor) -> None:
        """Count a tensor that depends on no exact one as rounded: each computation has computed it by itself."""
        if value.is_floating_point() and value not in self._variances:
            self._variances[value] = (UNIT * value).square()
            self._layers[value] = ()

    def mark(self, value: Tensor, layer: str) -> None:
        """Remember that an inexact tensor is the output of a layer."""
        self._layers[value] = (*self.layers(value), layer)

    def layers(self, value: Tensor) -> tuple[str, ...]:
        """The layers marked on the way from exact tensors to ``value``, in order."""
        layers: tuple[str, ...] = self._layers.get(value, ())
        return layers

    def bound(self, value: Tensor) -> Tensor:
        """Largest difference that rounding explains: :data:`MARGIN` standard deviations; float32, shape of ``value``.

        Zero for a tensor that does not depend on an exact one, and for a whole number that rounding cannot change.
        """
        variance = self._variances.get(value)
        if variance is None:
            return torch.zeros_like(value)
        least = _SMALLEST if value.is_floating_point() else 0.0
        result: Tensor = MARGIN * (variance + least).sqrt()
        return result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = [tensor for tensor in tensors_of(args) if tensor in self._variances or tensor in self._whole]
        looks_up = func.overloadpacket is torch.ops.aten.embedding  # rows are rounded, whatever chose them
        if not known and not looks_up:
            return func(*args, **kwargs)
        held = None  # the variance of what is changed in place, which is a view of another where that is one
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            held = self._variances.get(args[0])
            before = args[0].clone()  # an operator that works in place changes its input
            if args[0] in self._variances:
                self._variances[before] = self._variances[args[0]]
            result = func(*args, **kwargs)
            args = (before, *args[1:])
        else:
            result = func(*args, **kwargs)
        call = Call(self, func, args, kwargs, result)
        layers = tuple(dict.fromkeys(name for tensor in known for name in self.layers(tensor)))
        results = tensors_of(result)
        for value in results:
            self._layers[value] = layers
            if not value.is_floating_point():
                self._whole[value] = True
                self._choose(value, call)
        if looks_up or any(tensor in self._variances for tensor in known):
            rule = RULES.get(func.overloadpacket, tried)
            variances = tensors_of(rule(call))
            moves = rule is moved
        else:  # numbers that whole numbers chose, or that were made of them
            variances, moves = [(UNIT * value).square() for value in results], False
        for value, variance in zip(results, variances, strict=False):
            if value.is_floating_point():
                if held is not None and held.shape == variance.shape and 0 not in held.stride():
                    variance = held.copy_(variance)
                self._variances[value] = variance
            elif moves and variance.any():
                self._variances[value] = variance
        return result

    def _choose(self, value: Tensor, call: Call) -> None:
        """Note where a whole number is another if the numbers that it was chosen by are off by their errors."""
        rule = CHOICES.get(call.func.overloadpacket)
        if rule is not None and any(call.inexact(each) for each in tensors_of(call.args)):
            variance = (rule(call) / MARGIN).square()
            if variance.any():
                self._variances[value] = variance


@dataclass(frozen=True)
class Call:
    """One operator that ran, and what it ran on."""

    errors: RoundingErrors
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any

    def inexact(self, value: Any) -> bool:
        """Whether an argument depends on the sample."""
        return isinstance(value, Tensor) and value in self.errors._variances

    def variance(self, value: Any) -> Any:
        """Variance of an argument's error; 0 where the argument does not depend on the sample."""
        return self.errors._variances[value] if self.inexact(value) else 0.0

    def off(self, value: Any) -> Any:
        """How far an argument may be off."""
        return MARGIN * torch.as_tensor(self.variance(value)).sqrt()

    def argument(self, name: str) -> Any:
        """An argument by its name, or its default."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                given = self.args[position] if position < len(self.args) else self.kwargs.get(name)
                return argument.default_value if given is None and argument.has_default_value() else given
        return None

    def repeated(self, change: Callable[[Tensor], Tensor]) -> Any:
        """The result with every tensor among the arguments changed."""

        def changed(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            value = change(x)  # in the same memory format, or one that every view can be taken of
            return value if value.stride() == x.stride() else value.contiguous()

        return self.func(*tree_map(changed, self.args), **self.kwargs)
