"""The same bytes whatever runs the export: threads, hash seeds, folders, instruction sets, versions of Python.

Run ``python tests/repeatability.py``. Every export is made in processes of its own under different circumstances, and
each file must have the same sha256 everywhere. ``.pt`` checkpoints leave the codes to the machine's tanh, so that
instruction sets are compared on a safetensors file, which holds them. Other versions of Python, each with tqexport
installed from constraints.txt, are named with ``--python``. At the end it says how many codes of random weights this
machine's instruction sets give differently. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
CIRCUMSTANCES: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    "two threads": {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "1"},
    "random hashes": {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"},
    "AVX2": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX-512": {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx512", "PYTHONHASHSEED": "7"},
    "no vectors": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
EXPORTS = {
    "onnx": ("onnx net.safetensors --bits 1,4,8", "onnx net.safetensors --bits runtime"),
    "integer": ("onnx int.safetensors --bits 2,8 -o int", "c int.safetensors --bits 2 -o int"),
    "checkpoint": ("convert net.safetensors again.safetensors", "convert net.safetensors again.pt"),
    "tflite": ("tflite net.safetensors --bits 1,8", "tflite net.safetensors --bits runtime"),
    "calibrate": ("calibrate net.safetensors --data data.npz -o calibrated.safetensors",),
}
RUN = """
import sys
from tqexport.cli import main
lines = sys.argv[1:]
for line in lines:
    sys.argv = ["tqexport", *line.split()]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
COUNT = """
import numpy, torch
from tqexport.truncation import direct_codes, normalize
torch.set_num_threads(1)
if {numpy}:
    torch.Tensor.tanh = lambda values: torch.from_numpy(numpy.tanh(values.numpy()))
random = numpy.random.default_rng({seed})  # not torch's, whose numbers themselves depend on the instruction set
for number in range({rounds}):
    weight = torch.from_numpy(random.standard_normal(1 << 20, numpy.float32)) * 0.05 * (number % 20 + 1)
    print(direct_codes(normalize(weight), 8).byte().numpy().tobytes().hex())
"""


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exports", default=",".join(EXPORTS), help="which, separated by commas")
    parser.add_argument("--under", default=",".join(CIRCUMSTANCES), help="circumstances, separated by commas")
    parser.add_argument("--python", nargs="*", default=[], help="other interpreters, each with tqexport installed")
    parser.add_argument("--rounds", type=int, default=20, help="millions of random weights whose codes are compared")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()
    lines = [line for name in arguments.exports.split(",") for line in EXPORTS[name]]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="repeatability-") as root:
        made: dict[str, dict[str, str]] = {}
        sources = {"digits-resnet8": "net", "digits-resnet8-int": "int"}
        for name in sources:
            shutil.copy(FIXTURES / f"{name}.pt", root)
        run([f"convert {name}.pt {new}.safetensors" for name, new in sources.items()], Path(root), {})
        under = [(name, sys.executable, CIRCUMSTANCES[name]) for name in arguments.under.split(",")]
        under += [(python, python, under[0][2]) for python in arguments.python]
        for number, (circumstances, python, environment) in enumerate(under):
            folder = Path(root, "a folder" * (number % 2), f"place {number}")  # of another length, with a space
            folder.mkdir(parents=True)
            shutil.copy(FIXTURES / "digits-test.npz", folder / "data.npz")
            for name in ("net.safetensors", "int.safetensors"):
                shutil.copy(Path(root, name), folder)
            run(lines, folder, environment, python)
            inputs = ("data.npz", "net.safetensors", "int.safetensors")
            made[circumstances] = {name: sha256 for name, sha256 in hashes(folder).items() if name not in inputs}
        first = next(iter(made))
        for circumstances, files in made.items():
            differing = sorted(name for name in {*files, *made[first]} if files.get(name) != made[first].get(name))
            say(f"{circumstances}: {len(files)} files, {len(differing)} differ from those of {first} {differing or ''}")
            wrong += len(differing)
    if arguments.rounds:
        count_codes(arguments.rounds, arguments.seed)
    return 1 if wrong else 0


def run(lines: list[str], folder: Path, environment: dict[str, str], python: str = sys.executable) -> None:
    """Run commands in a process of their own; they must succeed."""
    program = [python, "-c", RUN, *lines]
    done = subprocess.run(program, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{lines} end with {done.returncode}: {done.stderr}")


def hashes(folder: Path) -> dict[str, str]:
    """sha256 by name of every file, of a manifest without the versions of what made the files."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in filter(lambda name: name.endswith("tqexport.json"), files):
        manifest = json.loads(files[name])
        for artifact in manifest["artifacts"]:
            del artifact["versions"]
        files[name] = json.dumps(manifest).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def count_codes(rounds: int, seed: int) -> None:
    """Say how many codes of the same random weights instruction sets give differently, and another library's tanh."""
    codes = {}
    for name in ("avx512", "avx2", "default", "numpy"):
        program = COUNT.format(seed=seed, rounds=rounds, numpy=name == "numpy")
        environment = {**os.environ, **({} if name == "numpy" else {"ATEN_CPU_CAPABILITY": name})}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        codes[name] = b"".join(bytes.fromhex(line) for line in done.stdout.decode().split())
    for name, own in codes.items():
        differences = Counter(abs(a - b) for a, b in zip(own, codes["avx512"], strict=True))
        differ = len(own) - differences[0]
        say(f"{name}: {differ} of {len(own):,} codes differ from those of avx512, by at most {max(differences)}")


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
