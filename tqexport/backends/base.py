"""What every back end can do: the seam between networks and file formats.

A back end is a folder in ``tqexport/backends/`` and one entry in :mod:`tqexport.backends`. Everything else in the
package (export folder, truncation, verification, commands) knows this protocol alone.
tests/backends/test_conformance.py is the suite that every back end passes; docs/architecture.md shows how one is added.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from tqexport.backends.parameters import REWRITTEN, Parameters
from tqexport.errors import InputError, UsageError
from tqexport.facts import ArtifactFacts, Facts
from tqexport.integer.names import is_integer
from tqexport.model import InputInfo
from tqexport.reading import limits
from tqexport.truncation import check_shiftable

if TYPE_CHECKING:
    from tqexport.backends.running import Array, Batch, Runner, Session, Stretches
    from tqexport.integer.model import IntegerModel
    from tqexport.integer.runtime import IntegerRuntime
    from tqexport.model import TruncModel

__all__ = ["EXACT", "EXACT_PACKED", "Backend", "Source", "TensorInfo", "batch_of", "input_infos", "is_exact"]

EXACT = "exact"
"""The kernel that every back end has: it computes what PyTorch computes, up to float32 rounding."""
EXACT_PACKED = "exact-packed"
"""The kernel that computes the same from weights that take fewer than 8 bits in the file."""


def is_exact(kernel: str | None) -> bool:
    """Whether a kernel computes what PyTorch computes; None is that of a file that names none."""
    return kernel in (None, EXACT, EXACT_PACKED)


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of an artifact; the batch dimension is the string ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def batch_of(inputs: Sequence[TensorInfo]) -> int | None:
    """How many samples a file takes at once, from its inputs; None for any number.

    Raises:
        InputError: It takes none, or more than an export can.
    """
    size = next((tensor.shape[0] for tensor in inputs if tensor.shape), None)
    if not isinstance(size, int):
        return None
    if not 1 <= size <= limits.BATCH:
        raise InputError(f"takes {size:,} samples at once; an export takes 1 to {limits.BATCH:,}")
    return size


def input_infos(inputs: Sequence[TensorInfo], facts: ArtifactFacts) -> tuple[InputInfo, ...]:
    """What an artifact takes, one sample each, channels first.

    Args:
        inputs: Its inputs, without the one that chooses a width.
        facts: What it says of itself.

    Raises:
        InputError: It takes what no file of tqexport does.
    """
    highest = facts.input_limits or (0,) * len(inputs)
    infos = []
    for tensor, limit in zip(inputs, highest, strict=False):
        free = {axis: size for axis, size in enumerate(tensor.shape[1:]) if isinstance(size, str)}
        if unknown := [size for size in free.values() if size not in facts.dynamic_sizes]:
            sizes = "x".join(map(str, tensor.shape))
            raise InputError(
                f"takes {tensor.name} of {sizes}, and does not say {unknown[0] or 'the size without a name'} in numbers"
            )
        shape = tuple(size if isinstance(size, int) else facts.dynamic_sizes[size] for size in tensor.shape[1:])
        if facts.layout == "channels last" and tensor.name not in facts.channels_first and len(shape) > 1:
            shape = (shape[-1], *shape[:-1])
        dtype = tensor.dtype.removesuffix("_")  # numpy.bool_
        try:
            infos.append(
                InputInfo(re.sub(r"\W", "_", tensor.name), shape, dtype, limit if "int" in dtype else None, free)
            )
        except UsageError as error:
            raise InputError(f"{error}; the file was changed since its export") from error
    return tuple(infos)


class Source(Protocol):
    """What a back end exports from: a checkpoint, and the files of other back ends that were made of it."""

    @property
    def model(self) -> TruncModel:
        """The reference network."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that the checkpoint has, ascending."""

    def file_name(self, backend: str, widths: Sequence[int], kernel: str = EXACT) -> str:
        """What the file of a back end is called."""

    def fixed_files(self, backend: str, widths: Sequence[int], batch: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Fixed files of a back end, as they were exported or made now."""

    def step(self, text: str, /) -> AbstractContextManager[object]:
        """Says what goes on while something slow runs."""


class Backend(ABC):
    """A file format that networks are exported to.

    Attributes:
        name: The format's name: of the command, in the manifest, and as the ending of its files.
        title: What people call it.
        layout: ``channels first`` or ``channels last``, of inputs and outputs.
        description: What the command's help says of its files.
        extra: The extra of the package that brings what exporting to it needs.
        kernels: The ways in which its files can multiply, by name, with a word on each for the command's help.
        verified_by_default: Whether ``verify`` makes a file for the check where there is none.
        runtimes: What runs its files here, by the name that ``verify --runtime`` takes, with what people call it.
        integer_runtimes: What runs its integer files besides.
        programs: Those of its runtimes that are programs of their own. Files are compared in them where they are named
            alone, and no process of ours is put around them.
        converts: The back end whose files it makes its own from; None where it starts from the network.
        packing: What a file of a packed kernel holds in the place of plain weights, by kernel, for ``inspect``.
        packed_widths: The widths that a file which is cut from another can be packed at.
        packages: What the bytes of its files depend on besides tqexport, by the name on PyPI.
        ordinary_batch: How many samples at once its files take where nothing is said of it; None for any number.
        fixes_batch: Whether another number can be chosen at the export.
        takes_folder: Whether its command takes an export folder in the place of a checkpoint, and exports the widths
            that were exported before.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layout: ClassVar[str]
    description: ClassVar[str]
    extra: ClassVar[str] = "torch"
    kernels: ClassVar[Mapping[str, str]] = {EXACT: ""}
    verified_by_default: ClassVar[bool] = False
    runtimes: ClassVar[Mapping[str, str]] = {}
    integer_runtimes: ClassVar[Mapping[str, str]] = {}
    programs: ClassVar[Collection[str]] = ()
    converts: ClassVar[str | None] = None
    packing: ClassVar[Mapping[str, str]] = {}
    packed_widths: ClassVar[Collection[int]] = ()
    packages: ClassVar[Sequence[str]] = ("torch",)
    ordinary_batch: ClassVar[int | None] = None
    fixes_batch: ClassVar[bool] = False
    takes_folder: ClassVar[bool] = False

    def label(self, widths: Sequence[int], kernel: str | None, batch: int | None = None) -> str:
        """What stands behind a checkpoint's name in that of a file: ``-w4``, ``-w4-dynamic``, ``-w4-batch8``."""
        width = f"-w{widths[0]}" if len(widths) == 1 else ""
        ordinary = next(iter(self.kernels))
        at_once = f"-batch{batch}" if batch not in (None, self.ordinary_batch) else ""
        return width + (f"-{kernel}" if kernel not in (None, ordinary) else "") + at_once

    def every_runtime(self) -> set[str]:
        """Names of all runtimes of its files, whatever the kernel."""
        return {*self.runtimes, *self.integer_runtimes}

    def runtimes_of(self, kernel: str) -> set[str]:
        """Names of the runtimes that the files of a kernel run in."""
        return self.every_runtime() if is_integer(kernel) else {*self.runtimes}

    def left_out(self, kernel: str) -> str:  # noqa: ARG002 - of those that have such kernels
        """What ``verify`` says of runtimes of this format that the files of a kernel do not run in; mostly nothing."""
        return ""

    def check_environment(self, kernel: str = EXACT) -> None:  # noqa: B027 - most back ends need nothing more
        """Make sure that what an export needs is there, before any slow work.

        Raises:
            HostError: A package is missing.
        """

    def check_runtime(self, runtime: str) -> None:  # noqa: B027 - most runtimes are there with the package
        """Make sure that a runtime is there.

        Raises:
            HostError: It is not installed.
        """

    # Making files. Each width of a network is a fixed file; some formats can hold several widths in one.

    @abstractmethod
    def export(
        self, source: Source, widths: Sequence[int], kernel: str = EXACT, batch: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Fixed files of some widths. The same checkpoint gives the same bytes.

        Args:
            source: What they are made of.
            widths: The widths.
            kernel: One of the back end's.
            batch: How many samples they take at once; None for :attr:`ordinary_batch`, and the only choice where
                :attr:`fixes_batch` is false.

        Raises:
            InputError: The checkpoint lacks a width.
            ConversionError: The network cannot be exported to this format.
        """

    def export_runtime(self, source: Source, kernel: str = EXACT, batch: int | None = None) -> bytes:  # noqa: ARG002
        """One file for every width of the checkpoint, chosen as it runs; arguments as of :meth:`export`.

        Raises:
            UsageError: The format has no such file.
            InputError: The codes of the network cannot be shifted, or its widths do not share one graph.
            ConversionError: The network cannot be exported to this format.
        """
        raise UsageError(f"one {self.title} file cannot hold several widths; name the widths to export")

    def export_truncatable(
        self,
        source: Source,  # noqa: ARG002 - of those that can
        widths: Sequence[int],  # noqa: ARG002
        batch: int | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[int, bytes]]:
        """Fixed files that other widths can be cut from; arguments as of :meth:`export`.

        Raises:
            UsageError: The format has no such file.
            InputError: The codes of the network cannot be shifted, or its widths do not share one graph.
        """
        raise UsageError(
            f"a {self.title} file of one width cannot hold others; a file for all widths (--bits runtime) gives every "
            "one of them with tqexport truncate, and so does an ONNX file made with --truncatable"
        )

    def check_network(self, source: Source, kernel: str = EXACT, *, run_time: bool = False) -> bool:
        """Refuse a network that the format does not take, as far as that shows without the slow part of an export.

        Args:
            source: The network; it need not be trained.
            kernel: One of the back end's.
            run_time: Ask for one file with every width instead of a file for each.

        Returns:
            Whether that is certain, as after an export; False where a conversion may refuse it still.

        Raises:
            UsageError: The format has no such file.
            InputError: The network is refused.
            HostError: A package is missing.
        """
        self.check_environment(kernel)
        if run_time:
            check_shiftable(source.widths, source.model.info.scheme.quantizer)
            self.export_runtime(source, kernel)
        else:
            for _ in self.export(source, source.widths, kernel):
                pass
        return True

    def companions(self, source: Source, file: str, content: bytes) -> dict[str, bytes]:  # noqa: ARG002 - most have none
        """What is written beside a file, by name; none of it says anything that the file does not.

        Args:
            source: What the file was exported from.
            file: Its name.
            content: The file.
        """
        return {}

    # Reading files.

    @abstractmethod
    def recognises(self, content: bytes) -> bool:
        """Whether a file's content is of this format, from its first bytes."""

    @abstractmethod
    def describe(self, content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        """Inputs and outputs of a file.

        Raises:
            InputError: It is damaged.
        """

    def batch(self, content: bytes) -> int | None:
        """How many samples a file takes at once; None for any number.

        Raises:
            InputError: It is damaged.
        """
        return batch_of(self.describe(content)[0])

    @abstractmethod
    def facts(self, content: bytes) -> Facts:
        """What a file says of itself.

        Raises:
            InputError: It is damaged, or tqexport did not write it.
        """

    @abstractmethod
    def codes(self, content: bytes, bits: int) -> dict[str, list[Array]]:
        """The codes that a file stores, at one of its widths, as in ``RuntimeRun``; nothing is run.

        Empty for a form of the integer kernel that holds folded weights in their place.

        Raises:
            InputError: It is damaged, or lacks them.
        """

    def cut(self, content: bytes, bits: int) -> bytes:  # noqa: ARG002 - of those that can
        """The fixed file of a width from a file with several, byte for byte as a direct export makes it.

        Raises:
            InputError: It is damaged. (Whether it has the width was asked before, and the result is proved after.)
            UsageError: Nothing can be cut from this format.
        """
        raise UsageError(
            f"nothing is cut from {self.title} files; export the width: tqexport {self.name} CHECKPOINT --bits {bits}"
        )

    def pack(self, content: bytes) -> bytes:  # noqa: ARG002 - of those that can
        """A fixed file whose weights take fewer bits, from one that is not packed; the same as an export gives.

        Raises:
            UsageError: The format has no such file, or not of this width or kernel.
            ConversionError: No weight would be smaller.
        """
        raise UsageError(f"the weights of a {self.title} file that is cut from another cannot be packed")

    def remainder(self, whole: bytes, first: bytes, bits: int) -> dict[str, bytes]:  # noqa: ARG002 - of those that can
        """What a file with several widths holds besides its packed file of a width, by name.

        Args:
            whole: The file.
            first: What :meth:`cut` and :meth:`pack` make of it.
            bits: The width.

        Raises:
            UsageError: Files of the format have no such parts.
        """
        raise UsageError(f"{self.title} files are not delivered in parts; split the ONNX file of the network")

    def rejoined(self, first: bytes, rest: Mapping[str, bytes], bits: int) -> bytes:  # noqa: ARG002 - of those that can
        """The file that two parts were made of, byte for byte; the inverse of :meth:`remainder`.

        Raises:
            InputError: A part is damaged, or of another format.
        """
        raise InputError(f"is no rest of a {self.title} file")

    @property
    def cuts(self) -> bool:
        """Whether widths can be cut from its files."""
        return type(self).cut is not Backend.cut

    def open_integers(
        self,
        content: bytes,  # noqa: ARG002
        network_at: Callable[[int], IntegerModel],  # noqa: ARG002
        bits: int,  # noqa: ARG002
        *,
        switched: bool,  # noqa: ARG002
        runtimes: Collection[str] = (),  # noqa: ARG002
    ) -> Iterator[IntegerRuntime]:
        """A file of the integer kernel in every runtime that is here, ready to be verified.

        Args:
            content: The file.
            network_at: The integer model that it must be at a width.
            bits: The width.
            switched: Whether it is a run-time file.
            runtimes: Open it in these alone; in all that are here where none is named.

        Raises:
            InputError: A runtime does not take the file.
        """
        return iter(())

    def compare_parameters(self, content: bytes, fresh: bytes, bits: int, *, switched: bool) -> Parameters:  # noqa: ARG002
        """Every constant, setting and wire of a file against those of a fresh export of the same kind.

        Args:
            content: The file.
            fresh: What the checkpoint gives.
            bits: The width to compare at.
            switched: Whether they are run-time files.

        Raises:
            InputError: The file is damaged, or lacks the width.
        """
        return Parameters(content, not_compared=None if content == fresh else REWRITTEN)

    def open_continuous(self, content: bytes, bits: int | None = None) -> Callable[[Batch], list[Array]] | None:  # noqa: ARG002
        """A file without its roundings of activations, or None where nothing here runs the format.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.

        Returns:
            From samples (N, ...) channels first to outputs (N, ...) in the layout of the file. Without
            roundings all of them depend on every parameter, be its effect ever so small.

        Raises:
            InputError: The runtime does not take the file, or the file lacks the width.
        """
        return None

    # Running files. A format that nothing here can run leaves these as they are; its codes are verified all the same.

    def open_session(self, content: bytes, *, threads: int = 1) -> Session | None:  # noqa: ARG002
        """A fixed file ready to run as an application runs it, or None where nothing here runs the format.

        Raises:
            InputError: The runtime does not take the file.
        """
        return None

    def open_runner(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner | None:  # noqa: ARG002
        """A file ready to be verified, or None where nothing here runs the format.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.
            deployed: With the optimisations that the runtime makes by default. Otherwise without, and with the output
                of every layer kept.

        Raises:
            InputError: The runtime does not take the file, or the file lacks the width.
        """
        return None

    def open_program(self, program: str, content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner:
        """A file ready to be verified in one of :attr:`programs`; the other arguments are those of :meth:`open_runner`.

        Raises:
            InputError: The program does not take the file, or the file lacks the width.
            HostError: The program is not installed.
        """
        raise NotImplementedError  # of a back end with programs

    def open_stretches(self, content: bytes, bits: int | None, activations: Collection[str]) -> Stretches | None:  # noqa: ARG002
        """A file cut at its activation quantisers, or None where nothing here runs the format.

        Args:
            content: The file.
            bits: The width to run a run-time file at; None for a fixed file.
            activations: Which roundings to cut at, by name (``<module>/Round``), as far as they depend on samples.

        Raises:
            InputError: The runtime does not take the file.
        """
        return None
