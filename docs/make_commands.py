"""Write docs/commands.md: what Click says of every command, and one real example of each with what it printed.

python docs/make_commands.py     runs the examples on the bundled checkpoint; make commands does the same

tests/test_docs.py compares the page with the commands as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from tqexport.cli import cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
_WIDTH = 100  # columns of the help, on a page as on a wide terminal

# The examples are run in this order, in a folder with ckpt.pt and samples.npz.
EXAMPLES = {
    "onnx": "onnx ckpt.pt --bits 2,8",
    "tflite": "tflite",
    "verify": "verify --bits 2,8",
    "evaluate": "evaluate --data samples.npz --bits 2,8",
    "truncate": "truncate tqexport-out/ckpt.onnx --bits 4 -o cut",
    "inspect": "inspect ckpt.pt",
    "gap": "gap ckpt.pt --bits 1,2,4 --data samples.npz",
    "calibrate": "calibrate ckpt.pt --data samples.npz",
    "c": "c ckpt-int.pt --bits runtime -o firmware",
    "convert": "convert ckpt.pt native.pt",
    "split": "split tqexport-out/ckpt.onnx --first 2 -o parts",
    "check": "check resnet8 --input-shape 3,32,32 --bits 2,8",
    "page": "page ckpt.pt --data samples.npz",
    "join": "join parts/ckpt-w2-exact-packed.onnx parts/ckpt-w2-rest.zip -o whole",
}
BEFORE = {"truncate": "onnx ckpt.pt --bits runtime"}  # what an example needs besides, and does not show

_TOP = """# Command reference

What `tqexport COMMAND --help` says, and an example with what it printed, on the bundled network
`fixtures/digits-resnet8.pt` as `ckpt.pt` and its held-out samples as `samples.npz`. Written by `make commands`.

Every command takes `--json`, which prints [one document](stability.md#schemas) on standard output and nothing else.
[Exit codes and refusals](refusals.md) has what the numbers mean.
"""


def help_of(command: click.Command, name: str) -> str:
    """What ``tqexport NAME --help`` prints."""
    top = click.Context(cli, info_name="tqexport", terminal_width=_WIDTH, **cli.context_settings)
    return command.get_help(click.Context(command, info_name=name, parent=top)).rstrip()


def section(name: str, output: str) -> str:
    """The part of the page about one command."""
    return (
        f"## tqexport {name}\n\n```text\n{help_of(cli.commands[name], name)}\n```\n\n"
        f"```console\n$ tqexport {EXAMPLES[name]}\n{output.rstrip()}\n```\n"
    )


def run_example(line: str, folder: Path) -> str:
    """What a command prints, without trailing spaces."""
    program = Path(sys.executable).with_name("tqexport")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([program, *line.split()], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"tqexport {line} failed: {done.stderr}")
    return tidy(done.stdout)


def tidy(output: str) -> str:
    """An output without trailing spaces and without empty lines above and below tables."""
    return re.sub(r"\n\n+", "\n", re.sub(r"[ \t]+$", "", output, flags=re.MULTILINE)).strip()


def main() -> None:
    """Run the examples and write the page."""
    if missing := [name for name in cli.commands if name not in EXAMPLES]:
        raise SystemExit(f"add an example of {', '.join(missing)} to EXAMPLES in {Path(__file__).name}")
    outputs = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copy(ROOT / "fixtures" / "digits-resnet8.pt", folder / "ckpt.pt")
        shutil.copy(ROOT / "fixtures" / "digits-test.npz", folder / "samples.npz")
        for name, line in EXAMPLES.items():
            if name in BEFORE:
                run_example(BEFORE[name], folder)
            outputs[name] = run_example(line, folder)
    parts = [_TOP, *(section(name, outputs[name]) for name in cli.commands)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
