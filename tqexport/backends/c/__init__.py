"""C99 for microcontrollers, written from the integer model and tried with this machine's C compiler."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from tqexport.backends.base import Backend, Source, TensorInfo
from tqexport.backends.parameters import Parameters, different_facts
from tqexport.errors import InputError
from tqexport.facts import DAMAGED, Facts, MultiWidthFacts, decode, facts_of_model
from tqexport.integer.names import INTEGER
from tqexport.truncation import STORED_BITS, check_shiftable

if TYPE_CHECKING:
    from tqexport.integer.model import IntegerModel
    from tqexport.integer.runtime import IntegerRuntime
    from tqexport.model import TruncModel

__all__ = ["CBackend"]

_SAMPLES = 3  # in NAME_test.c


class CBackend(Backend):
    """The back end for C."""

    name = "c"
    title = "C"
    layout = "channels last"
    description = (
        "Writes NAME-wB.c for each width B: C99 without heap, floats or libraries, equal to the integer model to the "
        "last bit, with its codes packed at 1, 2 and 4 bits. With --bits runtime it writes one NAME.c, which holds a "
        "code once and shifts it as it is read; its run function takes the width. Beside it lie NAME.h, which says how "
        "to call it, and NAME_test.c, which tries it on samples. The checkpoint needs grids: tqexport calibrate."
    )
    kernels = {INTEGER: "integers from end to end"}  # noqa: RUF012 - annotated in the protocol
    integer_runtimes = {"c": "C"}  # noqa: RUF012 - annotated in the protocol
    ordinary_batch = 1
    takes_folder = True

    def check_runtime(self, runtime: str) -> None:  # noqa: ARG002 - of one
        from tqexport.backends.c.runtime import compiler

        compiler()

    def export(
        self,
        source: Source,
        widths: Sequence[int],
        kernel: str = INTEGER,  # noqa: ARG002
        batch: int | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[int, bytes]]:
        for bits in widths:
            with source.step(f"Writing {bits} bits in C"):
                content = self._fixed(source, bits)
            yield bits, content

    def export_runtime(self, source: Source, kernel: str = INTEGER, batch: int | None = None) -> bytes:  # noqa: ARG002
        from tqexport.backends.c.source import render_c

        model, widths = source.model, source.widths
        check_shiftable(widths, model.info.scheme.quantizer)
        with source.step(f"Writing {len(widths)} widths in C"):
            by_width = {bits: facts_of_model(model, bits, self.layout, INTEGER) for bits in widths}
            facts = MultiWidthFacts(by_width, digests={})  # nothing is cut from C files
            networks = [_network(model, bits) for bits in widths]
            return render_c(networks, self._stem(source, widths), facts).source.encode()

    def companions(self, source: Source, file: str, content: bytes) -> dict[str, bytes]:
        from tqexport.backends.c.companions import header, test_program
        from tqexport.verification.samples import noise

        fresh, networks = self._fresh(content, lambda bits: _network(source.model, bits))
        info = source.model.info
        samples = noise(_SAMPLES, info.signature).normalized(info.normalization)
        stem = PurePath(file).stem
        return {
            f"{stem}.h": header(networks, stem, fresh.arena_bytes).encode(),
            f"{stem}_test.c": test_program(networks, stem, samples.inputs[0]).encode(),
        }

    def recognises(self, content: bytes) -> bool:
        from tqexport.backends.c.reading import MAGIC

        return content.startswith(MAGIC.encode())

    def describe(self, content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        from tqexport.backends.c.reading import record_of

        try:
            shapes = record_of(content)["shapes"]
            infos = [TensorInfo(name, "int8", (1, *map(int, shapes[name]))) for name in ("input", "output")]
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(DAMAGED) from error
        return (infos[0],), (infos[1],)

    def facts(self, content: bytes) -> Facts:
        from tqexport.backends.c.reading import record_of

        return decode(record_of(content))

    def codes(self, content: bytes, bits: int) -> dict[str, list[Any]]:
        from tqexport.backends.c.reading import stored_codes

        shift = STORED_BITS - bits if isinstance(self.facts(content), MultiWidthFacts) else 0
        return {name: [codes >> shift] for name, codes in stored_codes(content).items()}

    def compare_parameters(self, content: bytes, fresh: bytes, bits: int, *, switched: bool) -> Parameters:  # noqa: ARG002
        """What a file says of itself; all the rest is compared letter by letter where the file would be run."""
        facts = [self.facts(each) for each in (fresh, content)]
        expected, own = (each.by_width.get(bits) if isinstance(each, MultiWidthFacts) else each for each in facts)
        if expected is None or own is None:
            raise InputError(DAMAGED)  # the manifest has the width, the file has not
        return Parameters(content, different_facts(expected, own))

    def open_integers(
        self,
        content: bytes,
        network_at: Callable[[int], IntegerModel],
        bits: int,
        *,
        switched: bool,  # noqa: ARG002 - the file says so itself
        runtimes: Collection[str] = (),
    ) -> Iterator[IntegerRuntime]:
        from tqexport.backends.c.reading import stem_of
        from tqexport.backends.c.runtime import CRuntime

        if runtimes and CRuntime.key not in runtimes:
            return
        self.check_runtime(CRuntime.key)  # nothing else runs the file, and unseen it does not pass
        fresh, networks = self._fresh(content, network_at)
        yield CRuntime(content, fresh, networks, network_at(bits), stem_of(content))

    def _fresh(self, content: bytes, network_at: Callable[[int], IntegerModel]) -> tuple[Any, list[IntegerModel]]:
        """What the checkpoint gives for a file, and its integer models, widths ascending."""
        from tqexport.backends.c.reading import stem_of
        from tqexport.backends.c.source import render_c

        facts = self.facts(content)
        if isinstance(facts, MultiWidthFacts):
            facts, widths = replace(facts, digests={}), facts.widths
        else:
            widths = (facts.width,)
        networks = [network_at(bits) for bits in widths]
        return render_c(networks, stem_of(content), facts), networks

    def _fixed(self, source: Source, bits: int) -> bytes:
        from tqexport.backends.c.source import render_c

        facts = facts_of_model(source.model, bits, self.layout, INTEGER)
        return render_c([_network(source.model, bits)], self._stem(source, [bits]), facts).source.encode()

    def _stem(self, source: Source, widths: Sequence[int]) -> str:
        return PurePath(source.file_name(self.name, widths, INTEGER)).stem


def _network(model: TruncModel, bits: int) -> IntegerModel:
    from tqexport.integer.build import integer_model

    return integer_model(model, bits)
