"""TFLite files with the codes intact, by way of ONNX and onnx2tf, run in LiteRT."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqexport.backends.base import EXACT, EXACT_PACKED, Backend, Source, TensorInfo
from tqexport.backends.parameters import Parameters
from tqexport.backends.running import Runner, Session, Stretches
from tqexport.errors import UsageError
from tqexport.facts import Facts
from tqexport.integer.names import FLOAT_IO, INTEGER, PACKED, is_integer
from tqexport.truncation import STORED_BITS, check_shiftable

if TYPE_CHECKING:
    import onnx

    from tqexport.integer.model import IntegerModel
    from tqexport.integer.runtime import IntegerRuntime

__all__ = ["TfliteBackend"]

DYNAMIC = "dynamic"  # the kernel whose integer filters multiply as they are, with data rounded to 8 bits as it runs
DYNAMIC_PACKED = "dynamic-packed"
WIDEST_PACKED = 3  # of wider integers not all fit INT4


class TfliteBackend(Backend):
    """The back end for TFLite."""

    name = "tflite"
    title = "TFLite"
    layout = "channels last"
    extra = "tflite"
    description = (
        "Writes NAME-wB.tflite for each width B, with one byte per quantised weight. With --bits runtime it writes one "
        "NAME.tflite, with a signature for each width (w1 to w8) over one copy of the codes. Inputs are channels last "
        "(NHWC), as TFLite has them, one sample at a time, or N with --batch N (NAME-wB-batchN.tflite)."
    )
    kernels = {  # noqa: RUF012 - annotated in the protocol
        EXACT: "float kernels over the trained weights",
        EXACT_PACKED: "the same file with integers of 1 to 3 bits as INT4, two in a byte",
        DYNAMIC: "integer kernels, faster, which round their input",
        DYNAMIC_PACKED: "the same file with integers of 1 to 3 bits as INT4",
        INTEGER: "integers from end to end, of a checkpoint that tqexport calibrate gave grids; int8 in and out",
        FLOAT_IO: "the integer kernel with float32 in and out",
        PACKED: "the integer kernel with weights of 1 to 7 bits packed, int8 in and out, for TFLite Micro alone",
    }
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnx2tf", "tensorflow", "flatbuffers")
    verified_by_default = True
    runtimes = {"xnnpack": "LiteRT XNNPACK", "litert": "LiteRT"}  # noqa: RUF012 - annotated in the protocol
    integer_runtimes = {"tflm": "TFLite Micro"}  # noqa: RUF012 - annotated in the protocol
    converts = "onnx"
    packing = {  # noqa: RUF012 - annotated in the protocol
        **dict.fromkeys((EXACT_PACKED, DYNAMIC_PACKED), "weights are INT4, two in a byte"),
        PACKED: "weights that are smaller so are bit streams with a table of their int8 values",
    }
    packed_widths = range(1, WIDEST_PACKED + 1)
    takes_folder = True
    ordinary_batch = 1
    fixes_batch = True

    def check_environment(self, kernel: str = EXACT) -> None:
        from tqexport.backends.tflite.onnx2tf import check_converter

        if not is_integer(kernel):  # whose files are written from the integer model
            check_converter()
        if kernel == PACKED:  # every file is tried in what it is for
            self.check_runtime("tflm")

    def check_runtime(self, runtime: str) -> None:
        from tqexport.backends.tflite.micro import check_micro

        if runtime in self.integer_runtimes:
            check_micro()

    def runtimes_of(self, kernel: str) -> set[str]:
        return {*self.integer_runtimes} if kernel == PACKED else super().runtimes_of(kernel)

    def left_out(self, kernel: str) -> str:
        if kernel != PACKED:
            return ""
        return "packed files run in TFLite Micro alone: LiteRT has no operator that unpacks weights, so it was left out"

    def export(
        self, source: Source, widths: Sequence[int], kernel: str = EXACT, batch: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        from tqexport.backends.tflite.convert import convert_to_tflite, run_once
        from tqexport.backends.tflite.half_bytes import PLAIN_KERNELS, pack_tflite
        from tqexport.backends.tflite.half_bytes import check_packable as check_half_bytes
        from tqexport.backends.tflite.integer_form import check_packable, integer_tflite
        from tqexport.backends.tflite.micro import run_once_in_micro

        batch = batch or self.ordinary_batch
        if kernel in PLAIN_KERNELS:
            check_half_bytes(max(widths))
        if kernel == PACKED:
            check_packable(max(widths))  # before the first file is written
        if is_integer(kernel):
            for bits in widths:
                with source.step(f"Writing {bits} bits in integers to TFLite"):
                    content = integer_tflite(source.model, bits, kernel, batch)
                    (run_once_in_micro if kernel == PACKED else run_once)(content)
                yield bits, content
            return
        models = _onnx_models(source, widths)
        with source.step(f"Converting {len(models)} file{'s' * (len(models) > 1)} to TFLite"):
            converted = convert_to_tflite(models, PLAIN_KERNELS.get(kernel, kernel), batch)
            if kernel in PLAIN_KERNELS:
                converted = [pack_tflite(content) for content in converted]
                for content in converted:
                    run_once(content)
        yield from zip(widths, converted, strict=True)

    def export_runtime(self, source: Source, kernel: str = EXACT, batch: int | None = None) -> bytes:
        from tqexport.backends.tflite.runtime_file import convert_to_runtime_tflite

        if kernel in (EXACT_PACKED, DYNAMIC_PACKED):
            raise UsageError(
                "packed integers are those of one width; a run-time file holds whole codes, from which tqexport "
                "truncate --packed cuts packed files"
            )
        if is_integer(kernel):
            raise UsageError(
                "one TFLite file of integers cannot hold several widths: its kernels want filters that are constants; "
                "name the widths to export, or use the run-time ONNX file"
            )
        models = _onnx_models(source, source.widths)
        with source.step(f"Converting {len(models)} widths to one TFLite file"):
            return convert_to_runtime_tflite(models, kernel, batch or self.ordinary_batch)[0]

    def check_network(self, source: Source, kernel: str = EXACT, *, run_time: bool = False) -> bool:
        from tqexport.backends.tflite.convert import check_convertible

        if is_integer(kernel):  # written without a converter
            return super().check_network(source, kernel, run_time=run_time)
        self.check_environment(kernel)
        if run_time:
            check_shiftable(source.widths, source.model.info.scheme.quantizer)
        check_convertible(_onnx_models(source, source.widths), self.ordinary_batch)
        return False

    def recognises(self, content: bytes) -> bool:
        return content[4:8] == b"TFL3"

    def describe(self, content: bytes) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        from tqexport.backends.tflite.file import ends_of

        return ends_of(content)

    def facts(self, content: bytes) -> Facts:
        from tqexport.backends.tflite.file import unpack

        return unpack(content)[1]

    def codes(self, content: bytes, bits: int) -> dict[str, list[Any]]:
        from tqexport.backends.coded_weight import joined
        from tqexport.backends.tflite.cutting import computed_codes
        from tqexport.backends.tflite.file import single_graph, unpack
        from tqexport.backends.tflite.integers import stored_integers
        from tqexport.facts import MultiWidthFacts

        facts = unpack(content)[1]
        if isinstance(facts, MultiWidthFacts) and facts.own is None:
            shifted = computed_codes(single_graph(content, bits)[0])
            return joined({name: [codes >> (STORED_BITS - bits)] for name, codes in shifted.items()})
        return stored_integers(single_graph(content, None)[0])

    def cut(self, content: bytes, bits: int) -> bytes:
        from tqexport.backends.tflite.cutting import cut_tflite

        return cut_tflite(content, bits)

    def pack(self, content: bytes) -> bytes:
        from tqexport.backends.tflite.half_bytes import pack_tflite

        return pack_tflite(content)

    def compare_parameters(self, content: bytes, fresh: bytes, bits: int, *, switched: bool) -> Parameters:
        from tqexport.backends.tflite.parameters import compare_parameters

        return compare_parameters(content, fresh, bits, switched=switched)

    def open_continuous(self, content: bytes, bits: int | None = None) -> Callable[[Any], Any]:
        from tqexport.backends.tflite.parameters import without_roundings

        return without_roundings(content, bits)

    def open_integers(
        self,
        content: bytes,
        network_at: Callable[[int], IntegerModel],
        bits: int,
        *,
        switched: bool,  # noqa: ARG002 - no such file has several widths
        runtimes: Collection[str] = (),
    ) -> Iterator[IntegerRuntime]:
        from tqexport.backends.tflite.integer_runtime import open_integer_runtimes

        return open_integer_runtimes(content, network_at(bits), runtimes)

    def open_session(self, content: bytes, *, threads: int = 1) -> Session:
        from tqexport.backends.tflite.session import LiteRTSession

        return LiteRTSession(content, threads=threads)

    def open_runner(self, content: bytes, bits: int | None = None, *, deployed: bool = True) -> Runner:
        from tqexport.backends.tflite.runner import TfliteRunner

        return TfliteRunner(content, bits, deployed=deployed)

    def open_stretches(self, content: bytes, bits: int | None, activations: Collection[str]) -> Stretches:
        from tqexport.backends.tflite.runner import TfliteStretches

        return TfliteStretches(content, bits, activations)


def _onnx_models(source: Source, widths: Sequence[int]) -> list[onnx.ModelProto]:
    """The fixed ONNX files of some widths, without the tables of others."""
    from tqexport.backends.onnx.file import parse
    from tqexport.backends.onnx.truncatable import plain_file

    return [plain_file(parse(content)) for _, content in source.fixed_files("onnx", widths)]
