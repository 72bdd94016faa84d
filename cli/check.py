"""``tqexport check``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tqexport.backends import BACKENDS
from tqexport.model import DTYPES, CheckpointInfo, InputInfo

from .common import Output, Widths, input_shape_option, output_options, widths_option
from .inspect import inputs_line

if TYPE_CHECKING:
    from tqexport.analysis.readiness import Part
    from tqexport.networks.candidate import Candidate
    from tqexport.verification.trial import Answer

_DIFFERS, _REFUSED = 1, 3  # exit codes


def _input(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> tuple[InputInfo, ...]:
    """Read ``NAME:DTYPE:SHAPE`` or ``NAME:DTYPE:SHAPE:BELOW``; a size with a name, ``length=16``, is dynamic."""
    infos = []
    for text in texts:
        name, dtype, shape, below = (text.split(":") + [""] * 3)[:4]
        names, sizes = [], []
        for part in shape.split(",") if shape else []:
            size_name, _, size = part.rpartition("=")
            names.append(size_name)
            sizes.append(size)
        if text.count(":") not in (2, 3) or not all(size.isdecimal() for size in (*sizes, below or "0")):
            raise click.BadParameter(f"{text!r} is no NAME:DTYPE:SHAPE; write e.g. image:float32:3,32,32.")
        dynamic = {axis: size_name for axis, size_name in enumerate(names) if size_name}
        infos.append(InputInfo(name, tuple(map(int, sizes)), dtype, int(below) if below else None, dynamic))
    return tuple(infos)


def _arguments(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """Read ``NAME=VALUE``, each value as JSON where it is that, else as text."""
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is no NAME=VALUE; write e.g. classes=10.")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _names(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Read names that commas separate; none at all is a list too."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


@click.command("check")
@click.argument("factory", metavar="PACKAGE.MODULE:FACTORY")
@input_shape_option
@click.option(
    "--input",
    "inputs",
    multiple=True,
    callback=_input,
    metavar="NAME:DTYPE:SHAPE[:BELOW]",
    help=f"An input of a network with several, in the order of forward, e.g. tokens:int64:16:1000; DTYPE is "
    f"{', '.join(DTYPES)}, whole numbers are 0 to BELOW - 1, and a size such as length=16 is dynamic.",
)
@click.option(
    "--argument",
    "arguments",
    multiple=True,
    callback=_arguments,
    metavar="NAME=VALUE",
    help="A keyword argument of the factory; VALUE is JSON, or text.",
)
@widths_option("those that the network is prepared for, else 2,8")
@click.option(
    "--float-layers",
    callback=_names,
    metavar="NAMES",
    help="Layers that stay in float, with commas. Default: the first and the last one.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(list(BACKENDS)),
    help="A format that must take the network; may be repeated. Default: onnx and tflite; all are shown.",
)
@click.option("--convert", is_flag=True, help="Make the files and compare them with PyTorch, which takes a minute.")
@output_options
def command(
    factory: str,
    input_shape: tuple[int, ...] | None,
    inputs: tuple[InputInfo, ...],
    arguments: dict[str, Any],
    widths: Widths | None,
    float_layers: tuple[str, ...] | None,
    formats: tuple[str, ...],
    convert: bool,
    output: Output,
) -> int:
    """Say before any training what of a network is quantised, and which formats will take it.

    FACTORY is a function of yours, which runs. It returns a float network or one that went through tqexport.prepare,
    or that and its inputs, (network, inputs).

    Exit code 0: every --format takes the network, as far as shows in seconds, or for certain with --convert. 3: one
    does not, and the sentence says what to do. 1: with --convert, a file differs from PyTorch.
    """
    if input_shape and inputs:
        raise click.UsageError("Give --input-shape for one float32 input, or --input for each of several; not both.")
    with output.step("Building the network"):
        from tqexport.analysis.readiness import parts_of
        from tqexport.networks.candidate import build_candidate
        from tqexport.verification.trial import answers

        listed = widths.resolve(range(1, 9)) if widths else ()
        candidate = build_candidate(factory, arguments, inputs or input_shape or (), listed, float_layers)
        parts = parts_of(candidate)
    info = candidate.model.info
    wanted = {*formats} or {name for name, backend in BACKENDS.items() if backend.verified_by_default}
    shown = [name for name in BACKENDS if name in wanted or not formats]
    given = list(answers(candidate.model, shown, convert=convert, step=output.step))
    _say_network(output, info, candidate)
    _say_parts(output, parts)
    _say_answers(output, given)
    refusing = [name for name in shown if name in wanted and not all(a.taken for a in given if a.format == name)]
    output.say(_conclusion([name for name in shown if name in wanted], refusing, given))
    output.document(
        {
            "factory": factory,
            "arguments": arguments,
            "prepared_by_factory": not candidate.prepared_here,
            "inputs": [asdict(each) for each in info.signature],
            "widths": list(info.widths),
            "parts": [asdict(part) for part in parts],
            "formats": [asdict(answer) for answer in given],
            "asked": [name for name in shown if name in wanted],
            "refusing": refusing,
        }
    )
    if any(answer.verified is False for answer in given if answer.format in wanted):
        return _DIFFERS
    return _REFUSED if refusing else 0


def _say_network(output: Output, info: CheckpointInfo, candidate: Candidate) -> None:
    """Print what was built."""
    arguments = ", ".join(f"{key}={value}" for key, value in info.arguments.items())
    by = "prepared here, because the factory builds a float network" if candidate.prepared_here else "prepared"
    output.say(
        f"{info.architecture}({arguments}), {inputs_line(info)}",
        f"{by}; looked at with weights of {', '.join(map(str, info.widths))} bits",
    )


def _say_parts(output: Output, parts: Sequence[Part]) -> None:
    """Print what becomes of every weight and activation."""
    rows = [
        (
            *(part.name, part.kind, "x".join(map(str, part.shape))),
            ("8-bit codes" if part.shape else "levels") if part.quantized else "float32",
            part.reason,
        )
        for part in parts
    ]
    columns = ("layer", "kind", "shape", "becomes", "because")
    output.table(columns, rows, left=columns)


def _say_answers(output: Output, given: Sequence[Answer]) -> None:
    """Print which format takes the network, and every sentence of a refusal once."""
    rows = [(answer.format, answer.file, answer.kernel, _verdict(answer)) for answer in given]
    columns = ("format", "files", "kernel", "takes the network")
    output.table(columns, rows, left=columns)
    reasons = dict.fromkeys((answer.format, answer.why) for answer in given if answer.why)
    output.say(*(f"{name}: {why}" for name, why in reasons), *([""] if reasons else []))


def _verdict(answer: Answer) -> str:
    if not answer.taken:
        return "NO, the file differs" if answer.verified is False else "NO"
    if answer.verified:
        return "yes, and the files equal PyTorch"
    return "yes" if answer.certain else "yes, as far as shows before they are made"


def _conclusion(asked: Sequence[str], refusing: Sequence[str], given: Sequence[Answer]) -> str:
    """One line that says it all."""
    if refusing:
        return f"REFUSED by {' and '.join(refusing)}"
    doubt = any(not answer.certain for answer in given if answer.format in asked)
    verb = "takes" if len(asked) == 1 else "take"
    return f"GOOD: {' and '.join(asked)} {verb} the network{'; --convert makes sure of it' if doubt else ''}"
