"""What the README and the page about your own network show is what happens."""

from __future__ import annotations

import re
import subprocess
import sys

import torch
from commands import run
from places import ROOT
from tqexport.cli import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
YOUR_NETWORK = (ROOT / "docs" / "your-network.md").read_text(encoding="utf-8")


LOADER = "import torch\nloader = [(torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))) for _ in range(2)]\n"


def side(diff, sign):
    """One side of a diff: ``-`` as it was, ``+`` as it becomes."""
    return "".join(line[2:] or "\n" for line in diff.splitlines(keepends=True) if line[0] in (" ", "\n", sign))


def test_ten_lines_turn_an_ordinary_loop_into_one_whose_checkpoint_exports(tmp_path):
    diffs = re.findall(r"```diff\n(.*?)```", YOUR_NETWORK, re.DOTALL)
    assert sum(line.startswith("+") for diff in diffs for line in diff.splitlines()) <= 10
    for sign, written in (("-", "float.pt"), ("+", "ckpt.pt")):
        network, training = (side(diff, sign) for diff in diffs)
        (tmp_path / "net.py").write_text(network)
        (tmp_path / "train.py").write_text(LOADER + training)
        assert ("tqexport" in network + training) == (sign == "+")
        trained = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
        assert trained.returncode == 0, trained.stderr
        assert (tmp_path / written).is_file()
    (line,) = re.findall(r"^    tqexport (onnx ckpt.pt .*--model.*)$", YOUR_NETWORK, re.MULTILINE)
    exported = run(*line.split(), cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    untrusted = run("verify", "--bits", "2", cwd=tmp_path)
    assert untrusted.returncode == 2
    assert "was exported with --model net:build; if you trust it, add it here too" in untrusted.stderr
    assert run("verify", "--bits", "2", "--model", "net:build", cwd=tmp_path).returncode == 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["architecture"] == "net:build"


def test_every_command_is_in_the_readme():
    missing = [name for name in cli.commands if f"| `tqexport {name}" not in README]
    assert missing == []
