"""The command line: parse, call the library, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys

import click

from tqexport.backends import BACKENDS

from . import calibrate, check, convert, evaluate, gap, inspect, page, parts, truncate, verify
from .common import run_and_exit
from .export import export_command

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tqexport")
def cli() -> None:
    """Take TruncQuant networks to ONNX and TFLite with their 8-bit codes intact, and prove it.

    \b
    A first run:
      tqexport onnx ckpt.pt --bits 8
      tqexport tflite
      tqexport verify --bits 2,4,6

    \b
    Exit codes: 0 good, 1 model and export differ, 2 usage, 3 input refused, 4 something is missing on this
    machine, 70 a bug in tqexport, 130 interrupted, 143 terminated.
    """


for command in (
    *map(export_command, BACKENDS.values()),
    verify.command,
    evaluate.command,
    truncate.command,
    parts.split,
    parts.join,
    inspect.command,
    gap.command,
    calibrate.command,
    convert.command,
    check.command,
    page.command,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the ``tqexport`` command."""
    sys.exit(run_and_exit(cli))
