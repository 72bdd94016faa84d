"""Names for every value of a network while it runs, those inside a ``forward`` included.

A module's output is named after the module, ``layers.0.bn1``. What a function computes is named after the module whose
``forward`` calls it, ``layers.0/add``. Later calls in one run get a number: ``act:2``. The names depend on the order of
the calls alone, so that calibration, the reference network and the capture of its graph agree on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["FUNCTIONS", "INPUT", "NamedCalls"]

INPUT = "input"

# Functions whose results may need a grid, under the names that torch calls them by.
FUNCTIONS: Mapping[str, str] = {
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), "add"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "cat"),
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d"), "average_pool"),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), "adaptive_average_pool"),
    **dict.fromkeys(("mean", "_mean"), "mean"),
}


class NamedCalls(TorchFunctionMode):
    """Names every call that a network makes between entering and leaving; what happens then is for subclasses."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._modules = [
            (name, module) for name, module in root.named_modules() if name and "parametrizations" not in name
        ]
        self._handles: list[RemovableHandle] = []
        self._scopes = [""]
        self._counts: Counter[str] = Counter()
        self._busy = False

    def on_module(self, name: str, module: nn.Module, args: Sequence[Any], output: Any) -> Any:  # noqa: ARG002
        """Called with what a module returned; the result takes its place."""
        return output

    def on_function(
        self,
        name: str,  # noqa: ARG002
        function: Callable[..., Any],  # noqa: ARG002
        args: Sequence[Any],  # noqa: ARG002
        kwargs: Mapping[str, Any],  # noqa: ARG002
        output: Any,
    ) -> Any:
        """Called with what a torch function returned; the result takes its place."""
        return output

    def __enter__(self) -> NamedCalls:
        for name, module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._enters(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaves(name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function, and name what it computed."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)  # torch switches the mode off meanwhile
        if self._busy or not isinstance(output, Tensor):
            return output
        called = getattr(func, "__name__", str(func))
        scope = self._scopes[-1]
        kind = FUNCTIONS.get(called, called)
        return self.on_function(self._numbered(f"{scope}/{kind}" if scope else kind), func, args, kwargs, output)

    def _enters(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            self._scopes.append(name)
            self.on_enter(module)

        return hook

    def on_enter(self, module: nn.Module) -> None:
        """Called when a module begins to run."""

    def _leaves(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            self._scopes.pop()
            self._busy = True  # what a subclass computes is no part of the network
            try:
                return self.on_module(self._numbered(name), module, args, output)
            finally:
                self._busy = False

        return hook

    def _numbered(self, name: str) -> str:
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}:{self._counts[name]}"
