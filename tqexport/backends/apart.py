"""Files of strangers, open in their runtimes in a process of its own; see :mod:`tqexport.reading.apart`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from tqexport.backends.running import Runner, RuntimeRun, Stretches
from tqexport.reading.apart import Apart, Opened

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch
    from tqexport.integer.model import IntegerModel
    from tqexport.integer.runtime import IntegerRuntime

__all__ = ["BackendApart"]

_BUILD = f"{__name__}:build"


class BackendApart:
    """What a back end opens for verification, opened in a process of its own."""

    def __init__(self, apart: Apart, name: str) -> None:
        """Say which process.

        Args:
            apart: The process.
            name: Name of the back end.
        """
        self._apart, self._name = apart, name

    def open_runner(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner | None:
        """See :meth:`tqexport.backends.base.Backend.open_runner`."""
        opened = self._open("open_runner", content, bits, deployed=deployed)
        return None if opened is None else _Runner(opened)

    def open_stretches(self, content: bytes, bits: int | None, activations: Collection[str]) -> Stretches | None:
        """See :meth:`tqexport.backends.base.Backend.open_stretches`."""
        opened = self._open("open_stretches", content, bits, list(activations))
        return None if opened is None else _Stretches(opened)

    def open_continuous(self, content: bytes, bits: int | None = None) -> Callable[[Batch], list[Array]] | None:
        """See :meth:`tqexport.backends.base.Backend.open_continuous`."""
        opened = self._open("open_continuous", content, bits)
        return None if opened is None else lambda batch: cast("list[Array]", opened.call("ask", 0, "__call__", batch))

    def open_integers(
        self,
        content: bytes,
        network_at: Callable[[int], IntegerModel],
        bits: int,
        *,
        switched: bool,
        runtimes: Collection[str] = (),
    ) -> Iterator[IntegerRuntime]:
        """See :meth:`tqexport.backends.base.Backend.open_integers`; of a back end that needs one network alone."""
        from tqexport.integer.runtime import IntegerRuntimeApart  # which brings torch in

        settings = {"switched": switched, "runtimes": list(runtimes)}
        opened = self._apart.open(_BUILD, self._name, "open_integers", content, network_at(bits), bits, **settings)
        for number in range(opened.call("count")):
            yield IntegerRuntimeApart(opened, number)

    def _open(self, method: str, *arguments: Any, **settings: Any) -> Opened | None:
        """What a method gives; None where it gives nothing."""
        opened = self._apart.open(_BUILD, self._name, method, *arguments, **settings)
        return opened if opened.call("count") else None


class _Runner(Runner):
    """A runner in the other process."""

    def __init__(self, opened: Opened) -> None:
        super().__init__((), (), (), deployed=True)  # the other one knows
        self._opened = opened

    def run(self, batch: Batch) -> RuntimeRun:
        return cast(RuntimeRun, self._opened.call("ask", 0, "run", batch))

    def run_traced(self, batch: Batch) -> tuple[dict[str, list[Array]], list[Array]]:
        return cast("tuple[dict[str, list[Array]], list[Array]]", self._opened.call("ask", 0, "run_traced", batch))

    def run_untouched(self, batch: Batch) -> list[Array]:
        return cast("list[Array]", self._opened.call("ask", 0, "run_untouched", batch))

    def latency(self, sample: Batch) -> float:
        return cast(float, self._opened.call("ask", 0, "latency", sample))


class _Stretches:
    """Stretches in the other process."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def __call__(self, batch: Batch, levels: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        return cast(
            "tuple[list[Array], dict[str, Array]]", self._opened.call("ask", 0, "__call__", batch, dict(levels))
        )


def build(name: str, method: str, *arguments: Any, **settings: Any) -> _Served:
    """In the other process: what a method of a back end gives."""
    from tqexport.backends import BACKENDS

    if method == "open_integers":
        content, network, bits = arguments
        return _Served(list(BACKENDS[name].open_integers(content, lambda _: network, bits, **settings)))
    result = getattr(BACKENDS[name], method)(*arguments, **settings)
    return _Served([] if result is None else [result])


class _Served:
    """In the other process: what a back end opened."""

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    def count(self) -> int:
        return len(self._results)

    def about(self, number: int) -> tuple[Any, ...]:
        runtime = self._results[number]
        return runtime.key, runtime.name, runtime.rounding, runtime.differing

    def ask(self, number: int, method: str, *arguments: Any) -> Any:
        return getattr(self._results[number], method)(*arguments)
