"""ONNX files with 8-bit codes and an explicit BitShift, run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqexport.backends.base import EXACT, EXACT_PACKED, Backend, Source, TensorInfo
from tqexport.backends.parameters import Parameters
from tqexport.backends.running import Runner, Session, Stretches
from tqexport.errors import UsageError
from tqexport.facts import Facts
from tqexport.integer.names import FOLDED, INTEGER, PACKED, SYMMETRIC, is_integer

if TYPE_CHECKING:
    from tqexport.integer.model import IntegerModel
    from tqexport.integer.runtime import IntegerRuntime

__all__ = ["OnnxBackend"]

LAYOUT = "channels first"
WIDEST_PACKED = 4  # of wider codes no two fit into a byte
_PACKED_KERNELS = (EXACT_PACKED, PACKED)


class OnnxBackend(Backend):
    """The back end for ONNX."""

    name = "onnx"
    title = "ONNX"
    layout = LAYOUT
    packages = ("torch", "onnx", "onnx-ir", "onnxscript")
    extra = "onnx"
    verified_by_default = True
    fixes_batch = True
    runtimes = {"onnxruntime": "onnxruntime", "web": "onnxruntime-web"}  # noqa: RUF012 - annotated in the protocol
    programs = ("web",)
    kernels = {  # noqa: RUF012 - annotated in the protocol
        EXACT: "float kernels over the trained weights",
        EXACT_PACKED: "the same file with several codes of 1 to 4 bits in a byte",
        INTEGER: "integer kernels alone, of a checkpoint that tqexport calibrate gave grids",
        PACKED: "the same with several codes of 1 to 4 bits in a byte",
        FOLDED: "the integer kernel with int8 weights instead of codes and shift, for compilers that fold nothing",
        SYMMETRIC: "the same with int8 values without zero points, for compilers that know none, such as TensorRT; "
        "of a checkpoint calibrated with --symmetric, activations of at most 7 bits",
    }
    packing = dict.fromkeys(
        (EXACT_PACKED, PACKED), "weights that are smaller so are bytes with several codes in each, of 1, 2 or 4 bits"
    )
    packed_widths = range(1, WIDEST_PACKED + 1)
    description = (
        "Writes NAME-wB.onnx for each width B, with 8-bit codes and a BitShift node, and the manifest tqexport.json. "
        "With --bits runtime it writes one NAME.onnx, whose second input, bits, chooses the width as it runs. Files "
        "take any number of samples at once; with --batch N (NAME-wB-batchN.onnx) N, and all shapes are numbers, as "
        "compilers for accelerators want them."
    )

    def check_runtime(self, runtime: str) -> None:
        from tqexport.backends.onnx.web_session import check_web

        if runtime == "web":
            check_web()

    def export(
        self,
        source: Source,
        widths: Sequence[int],
        kernel: str = EXACT,
        batch: int | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        from tqexport.backends.onnx.export import export_onnx
        from tqexport.backends.onnx.integer_form import integer_onnx
        from tqexport.backends.onnx.packing import check_packable, pack_onnx

        if kernel in _PACKED_KERNELS:
            check_packable(max(widths))  # before the first file is written
        exported: Iterator[tuple[int, bytes]]
        if is_integer(kernel):
            exported = ((bits, integer_onnx(source.model, bits, kernel, batch)) for bits in widths)
        else:
            exported = export_onnx(source.model, tuple(widths), batch)
        for bits in widths:
            with source.step(f"Exporting {bits} bits to ONNX"):
                _, content = next(exported)
                if kernel == EXACT_PACKED:
                    content = pack_onnx(content)
            yield bits, content

    def export_runtime(self, source: Source, kernel: str = EXACT, batch: int | None = None) -> bytes:
        from tqexport.backends.onnx.integer_runtime_file import WIDEST, runtime_integer_onnx
        from tqexport.backends.onnx.runtime_file import merge_onnx

        if kernel in _PACKED_KERNELS:
            raise UsageError(
                "packed codes are those of one width; a run-time file holds whole codes, from which tqexport truncate "
                "--packed cuts packed files"
            )
        if kernel in (FOLDED, SYMMETRIC):
            raise UsageError("folded weights are those of one width; a run-time file holds the codes: --kernel integer")
        if kernel == INTEGER:
            return runtime_integer_onnx(source.model, [bits for bits in source.widths if bits <= WIDEST], batch)
        return merge_onnx(source.fixed_files(self.name, source.widths, batch))

    def export_truncatable(
        self,
        source: Source,
        widths: Sequence[int],
        batch: int | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        from tqexport.backends.onnx.truncatable import truncatable_onnx

        return truncatable_onnx(source.fixed_files(self.name, source.widths, batch), widths)

    def recognises(self, content: bytes) -> bool:
        return content[:1] == b"\x08"  # the first field of the protobuf message, ir_version, is a number

    def describe(self, content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        from tqexport.backends.onnx.file import describe, parse

        return describe(parse(content))

    def facts(self, content: bytes) -> Facts:
        from tqexport.backends.onnx.file import parse, read_facts

        return read_facts(parse(content))

    def codes(self, content: bytes, bits: int) -> dict[str, list[Any]]:
        from tqexport.backends.onnx.file import parse, read_facts, shifted_codes
        from tqexport.facts import ArtifactFacts

        model = parse(content)
        facts = read_facts(model)
        if isinstance(facts, ArtifactFacts) and facts.kernel in (FOLDED, SYMMETRIC):
            return {}
        return shifted_codes(model, bits)

    def cut(self, content: bytes, bits: int) -> bytes:
        from tqexport.backends.onnx.cutting import cut_onnx

        return cut_onnx(content, bits)

    def pack(self, content: bytes) -> bytes:
        from tqexport.backends.onnx.packing import pack_onnx

        return pack_onnx(content)

    def remainder(self, whole: bytes, first: bytes, bits: int) -> dict[str, bytes]:
        from tqexport.backends.onnx.parts import remainder

        return remainder(whole, first, bits)

    def rejoined(self, first: bytes, rest: Mapping[str, bytes], bits: int) -> bytes:
        from tqexport.backends.onnx.parts import rejoined

        return rejoined(first, rest, bits)

    def compare_parameters(self, content: bytes, fresh: bytes, bits: int, *, switched: bool) -> Parameters:  # noqa: ARG002
        from tqexport.backends.onnx.parameters import compare_parameters

        return compare_parameters(content, fresh, bits)

    def open_continuous(self, content: bytes, bits: int | None = None) -> Callable[[Any], Any]:
        from tqexport.backends.onnx.parameters import without_roundings

        return without_roundings(content, bits).run

    def open_integers(
        self,
        content: bytes,
        network_at: Callable[[int], IntegerModel],
        bits: int,
        *,
        switched: bool,
        runtimes: Collection[str] = (),
    ) -> Iterator[IntegerRuntime]:
        from tqexport.backends.onnx.integer_runtime import IntegerOnnxRuntime, IntegerWebRuntime

        for runtime in (IntegerOnnxRuntime, IntegerWebRuntime):
            if runtime.key in (runtimes or (IntegerOnnxRuntime.key,)):
                yield runtime(content, network_at(bits), switched=switched)

    def open_session(self, content: bytes, *, threads: int = 1) -> Session:
        from tqexport.backends.onnx.session import OnnxSession

        return OnnxSession(content, threads=threads)

    def open_runner(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner:
        from tqexport.backends.onnx.runner import OnnxRunner

        return OnnxRunner(content, bits, deployed=deployed)

    def open_program(self, program: str, content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner:  # noqa: ARG002 - of one
        from tqexport.backends.onnx.runner import WebRunner

        return WebRunner(content, bits, deployed=deployed)

    def open_stretches(self, content: bytes, bits: int | None, activations: Collection[str]) -> Stretches:
        from tqexport.backends.onnx.runner import OnnxStretches

        return OnnxStretches(content, bits, activations)
