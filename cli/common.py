"""What the commands share: widths, options, output, and the edge where errors become words and exit codes."""

from __future__ import annotations

import functools
import json
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import TqExportError, UsageError, printable
from tqexport.extras import lacking
from tqexport.files import write_bytes

from .interrupts import WORD, end_on_interrupts

__all__ = [
    "Output",
    "Widths",
    "checkpoint_options",
    "input_shape_option",
    "output_options",
    "plural_bits",
    "run_and_exit",
    "widths_option",
    "write_new",
]

BUG_EXIT_CODE = 70
_LOG_WIDTH = 160  # columns where there is no terminal, so that no table is folded


@dataclass(frozen=True)
class Widths:
    """Bit widths as a user wrote them."""

    listed: tuple[int, ...] = ()  # empty: all that the checkpoint has
    run_time: bool = False  # one file for all of them

    def resolve(self, available: Sequence[int]) -> tuple[int, ...]:
        """The widths that the user asked for, ascending; ``available`` where that was all of them."""
        return self.listed or tuple(available)


def widths_option(help_default: str, default: str | None = None, *, run_time: bool = False) -> Callable[[Any], Any]:
    """``--bits``, which says at which widths a command works.

    Args:
        help_default: What the help says of the default.
        default: The default as a user would write it; None lets the command choose.
        run_time: Whether ``runtime`` is allowed, which asks for one file with every width.
    """

    def widths(_context: click.Context, _option: click.Parameter, text: str | None) -> Widths | None:
        """Read widths and ranges of widths, ``all`` or ``runtime``."""
        if text is None or text.strip().lower() == "all":
            return None if text is None else Widths()
        if text.strip().lower() == "runtime":
            if not run_time:
                raise click.BadParameter("runtime is for exporting; name widths, or all.")
            return Widths(run_time=True)
        listed: set[int] = set()
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last <= 8:
                raise click.BadParameter(f"{text!r} is no list of widths from 1 to 8; write 8, 2,4,8, 1-8 or all.")
            listed.update(range(first, last + 1))
        return Widths(tuple(sorted(listed)))

    or_runtime = ", or runtime for one file with every width" if run_time else ""
    return click.option(
        "--bits",
        "widths",
        callback=widths,
        default=default,
        metavar="WIDTHS",
        help=f"Widths: 8, 2,4,8, 1-8 or all{or_runtime}. Default: {help_default}.",
    )


def _integers(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Read positive whole numbers that commas separate."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text) or "0" in text.split(","):
        raise click.BadParameter(f"{text!r} is no list of positive whole numbers; write e.g. 3,32,32.")
    return tuple(map(int, text.split(",")))


def _activation_widths(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Read activation widths, which may also be 32."""
    widths = _integers(context, option, text)
    if not {*(widths or ())} <= {*range(1, 9), 32}:
        raise click.BadParameter(f"{text!r}: activation widths are 1 to 8, or 32 for float.")
    return widths


input_shape_option = click.option("--input-shape", callback=_integers, metavar="C,H,W", help="Shape of one sample.")

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
        callback=_activation_widths,
        metavar="WIDTHS",
        help="Activation widths: one for all, or one per width; 32 is float. Default: as the weights.",
    ),
    click.option(
        "--bn-key",
        type=click.Choice(["weight", "activation"]),
        help="Which width chooses the BatchNorm. Default: weight.",
    ),
    input_shape_option,
)


def checkpoint_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say about a checkpoint what its file does not; the command gets them as ``options``."""

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        options = ReadOptions(**{name: arguments.pop(name) for name in ReadOptions.__dataclass_fields__})
        return function(**arguments, options=options)

    for option in reversed(_CHECKPOINT_OPTIONS):
        command = option(command)
    return command


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` and ``--verbose``, which every command has; the command gets an :class:`Output` as ``output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
    @click.option("--verbose", is_flag=True, help="Show what the converters print, and tracebacks.")
    @functools.wraps(function)
    def command(as_json: bool, verbose: bool, **arguments: Any) -> Any:
        return function(**arguments, output=Output(as_json=as_json, verbose=verbose))

    return command


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

    def say(self, *lines: str) -> None:
        """Print lines for people."""
        for line in lines:
            self.people.print(printable(line))

    def table(
        self, columns: Iterable[str], rows: Iterable[Sequence[str]], *, left: Collection[str] = (), **settings: Any
    ) -> None:
        """Print a table for people.

        Args:
            columns: The headings.
            rows: The cells of each row.
            left: Headings of the columns that are justified to the left; all others are justified to the right.
            settings: Further settings of :class:`rich.table.Table`.
        """
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, **settings)
        for column in columns:
            table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(printable, row))
        self.people.print(table)

    def document(self, content: dict[str, Any]) -> None:
        """Print the JSON document if ``--json`` asks for one."""
        if self.as_json:
            click.echo(json.dumps(content, indent=2))

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show a spinner while something slow runs; on a terminal only."""
        if self.progress.is_terminal:
            with self.progress.status(f"{text} …"):
                yield
        else:
            yield


def check_new(target: Path, content: bytes) -> None:
    """Refuse to put a file in the place of another one.

    Raises:
        UsageError: Another one is there.
    """
    if target.is_file() and target.read_bytes() != content:
        raise UsageError(f"{target} is another file already; name another folder with --output, or remove it")


def write_new(target: Path, content: bytes) -> None:
    """Write a file, unless another one is there; see :func:`check_new`."""
    check_new(target, content)
    if not target.is_file():
        write_bytes(target, content)


def plural_bits(width: int) -> str:
    """A width in words: ``1 bit``, ``4 bits``."""
    return f"{width} bit{'s' * (width != 1)}"


def run_and_exit(cli: click.Group) -> int:
    """Run the command line and return its exit code; every failure is one sentence on standard error.

    Errors of usage are raised before any option is parsed, so ``--json`` and ``--verbose`` are looked up in the
    arguments themselves.
    """
    arguments = sys.argv[1:]
    end_on_interrupts()
    try:
        result = cli.main(arguments, prog_name="tqexport", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.Abort:
        click.echo(WORD, err=True)
        return 128 + signal.SIGINT
    except Exception as error:
        text, exit_code = _explain(error, verbose="--verbose" in arguments)
    if "--json" in arguments:
        click.echo(json.dumps({"error": text, "exit_code": exit_code}, indent=2))
    return exit_code


def _explain(error: Exception, *, verbose: bool) -> tuple[str, int]:
    """Print what went wrong on standard error; returns the sentence and the exit code."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.format_message(), error.exit_code
    advice = ""
    explained = lacking(error) if isinstance(error, ImportError) else error
    if isinstance(explained, TqExportError):
        text, exit_code = str(explained), explained.exit_code
    else:  # a bug must not look like a failed parity check, which is exit code 1
        if verbose:
            traceback.print_exception(error)
        text, exit_code = f"internal error, {type(error).__name__}: {error}", BUG_EXIT_CODE
        advice = "\nThis is a bug in tqexport; --verbose shows where."
    click.echo(printable(f"tqexport: {text}{advice}"), err=True)
    return text, exit_code
