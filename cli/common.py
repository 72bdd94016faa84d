"""What the commands share: widths, options, output, and the edge where errors become words and exit codes."""

from __future__ import annotations

import functools
import json
import logging
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import HostError, TqExportError

if TYPE_CHECKING:
    from tqexport.artifacts.manifest import Artifact

__all__ = [
    "Output",
    "Widths",
    "checkpoint_options",
    "output_options",
    "run_and_exit",
    "say_artifact",
    "widths_option",
]

BUG_EXIT_CODE = 70
INTERRUPTED_EXIT_CODE = 130
_LOG_WIDTH = 160  # columns where there is no terminal, so that no table is folded
_PACKAGES = {  # by the name that is imported
    "ai_edge_litert": "ai-edge-litert",
    "onnx": "onnx",
    "onnx2tf": "onnx2tf",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "tensorflow": "tensorflow",
    "torch": "torch",
}


@dataclass(frozen=True)
class Widths:
    """Bit widths as a user wrote them."""

    listed: tuple[int, ...] = ()  # empty: all that the checkpoint has
    run_time: bool = False  # one file for all of them

    def resolve(self, available: Sequence[int]) -> tuple[int, ...]:
        """The widths meant, ascending."""
        return self.listed or tuple(available)


class _WidthsType(click.ParamType[Widths]):
    name = "widths"

    def __init__(self, run_time: bool) -> None:
        self.run_time = run_time

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Widths:
        if isinstance(value, Widths):
            return value
        if value.strip().lower() == "all":
            return Widths()
        if value.strip().lower() == "runtime":
            if not self.run_time:
                self.fail("runtime is for exporting; name widths, or all.", param, ctx)
            return Widths(run_time=True)
        widths: set[int] = set()
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last <= 8:
                self.fail(f"{value!r} is no list of widths from 1 to 8; write 8, 2,4,8, 1-8 or all.", param, ctx)
            widths.update(range(first, last + 1))
        return Widths(tuple(sorted(widths)))


def widths_option(help_default: str, default: str | None = None, *, run_time: bool = False) -> Callable[[Any], Any]:
    """``--bits``."""
    switched = ", or runtime for one file with every width" if run_time else ""
    return click.option(
        "--bits",
        "widths",
        type=_WidthsType(run_time),
        default=default,
        metavar="WIDTHS",
        help=f"Widths: 8, 2,4,8, 1-8 or all{switched}. Default: {help_default}.",
    )


class _IntegersType(click.ParamType[tuple[int, ...]]):
    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"\d+(,\d+)*", value) or "0" in value.split(","):
            self.fail(f"{value!r} is no list of positive whole numbers; write e.g. 3,32,32.", param, ctx)
        return tuple(map(int, value.split(",")))


class _ActivationBitsType(_IntegersType):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        widths = super().convert(value, param, ctx)
        if not {*widths} <= {*range(1, 9), 32}:
            self.fail(f"{value!r}: activation widths are 1 to 8, or 32 for float.", param, ctx)
        return widths


_CHECKPOINT_OPTIONS = (
    click.option("--arch", metavar="NAME", help="Architecture, where the file does not say it."),
    click.option(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Build the network with a function of your own, called with the checkpoint's arguments.",
    ),
    click.option(
        "--quantizer", type=click.Choice(["truncquant", "dorefa"]), help="How it was trained. Default: truncquant."
    ),
    click.option(
        "--bias-correction/--no-bias-correction", default=None, help="Whether its weights are corrected. Default: no."
    ),
    click.option(
        "--act-bits",
        type=_ActivationBitsType(),
        metavar="WIDTHS",
        help="Activation widths: one for all, or one per width; 32 is float. Default: as the weights.",
    ),
    click.option(
        "--bn-key",
        type=click.Choice(["weight", "activation"]),
        help="Which width chooses the BatchNorm. Default: weight.",
    ),
    click.option("--input-shape", type=_IntegersType(), metavar="C,H,W", help="Shape of one sample."),
)


def checkpoint_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say about a checkpoint what its file does not; the command gets them as ``options``."""

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        said = {name: arguments.pop(name) for name in ReadOptions.__dataclass_fields__}
        return function(**arguments, options=ReadOptions(**said))

    for option in reversed(_CHECKPOINT_OPTIONS):
        command = option(command)
    return command


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` and ``--verbose``, which every command has."""
    for option in (
        click.option("--verbose", is_flag=True, help="Show what the converters print, and tracebacks."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output."),
    ):
        function = option(function)
    return function


class Output:
    """Where a command's words go: people read standard output, or with ``--json`` standard error."""

    def __init__(self, *, as_json: bool, verbose: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        width = None if (sys.stderr if as_json else sys.stdout).isatty() else _LOG_WIDTH
        self.people = Console(width=width, stderr=as_json, highlight=False, soft_wrap=True, emoji=False, markup=False)
        self.progress = Console(stderr=True)
        logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
        logging.getLogger("tqexport").setLevel(logging.DEBUG if verbose else logging.WARNING)

    def say(self, text: Any = "") -> None:
        """A line, or a table, for people."""
        self.people.print(text)

    def document(self, content: dict[str, Any]) -> None:
        """The JSON document, where one was asked for."""
        if self.as_json:
            click.echo(json.dumps(content, indent=2))

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A spinner while something slow runs, on a terminal only."""
        if self.progress.is_terminal:
            with self.progress.status(f"{text} …"):
                yield
        else:
            yield


def say_artifact(output: Output, folder: Path, artifact: Artifact) -> None:
    """One line per file written."""
    cut = f", can be truncated to {', '.join(map(str, artifact.truncatable_to))}" if artifact.truncatable_to else ""
    output.say(f"{folder / artifact.file}  {artifact.bytes:,} bytes, {artifact.layout}{cut}")


def run_and_exit(cli: click.Group) -> int:
    """Run the command line and return its exit code; every failure is one sentence on standard error."""
    arguments = sys.argv[1:]
    interrupts: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)
    try:
        result = cli.main(arguments, prog_name="tqexport", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BaseException as error:
        # Compiled code may turn the interrupt into an error of its own on the way here.
        return _exit_code(KeyboardInterrupt() if interrupts else error, verbose="--verbose" in arguments)


def _exit_code(raised: BaseException, *, verbose: bool) -> int:
    try:
        raise raised
    except click.ClickException as error:
        error.show()
        return _failed(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED_EXIT_CODE
    except TqExportError as error:
        click.echo(f"tqexport: {error}", err=True)
        return _failed(str(error), error.exit_code)
    except ImportError as error:
        package = _PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            return _bug(error, verbose=verbose)
        text = f"this machine lacks {package}, or it does not load ({error}): pip install {package}"
        click.echo(f"tqexport: {text}", err=True)
        return _failed(text, HostError.exit_code)
    except Exception as error:
        return _bug(error, verbose=verbose)


def _bug(error: Exception, *, verbose: bool) -> int:
    """A bug must not look like a failed parity check, which is exit code 1."""
    if verbose:
        traceback.print_exc()
    text = f"internal error, {type(error).__name__}: {error}"
    click.echo(f"tqexport: {text}\nThis is a bug in tqexport; --verbose shows where.", err=True)
    return _failed(text, BUG_EXIT_CODE)


def _failed(text: str, exit_code: int) -> int:
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": text, "exit_code": exit_code}, indent=2))
    return exit_code
