"""The wheel and the sdist, installed into empty environments; needs a network, so ``make package-test`` runs it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile

import pytest
from places import DATA, DIGITS, ROOT

pytestmark = pytest.mark.package

PROGRAM = """
import sys
import numpy as np
from tqexport.runtime import SwitchableModel

model = SwitchableModel(sys.argv[1])
shape = (1, 3, 40, 40) if sys.argv[1].endswith("onnx") else (1, 40, 40, 3)
for model.bits in model.widths:
    print(model.bits, model.run(np.ones(shape, np.float32)).shape)
"""


def call(*arguments, **options):
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, **options)


SUFFIXES = (".py", ".c", ".j2", ".html", ".css", ".js", ".mjs")  # of all that the package consists of


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the sdist that ``python -m build`` makes."""
    folder = tmp_path_factory.mktemp("dist")
    built = call(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture
def environment(tmp_path):
    """Installs into an empty environment; gives the folder of its programs."""

    def install(*requirements):
        made = call(sys.executable, "-m", "venv", tmp_path / "venv")
        assert made.returncode == 0, made.stderr
        programs = tmp_path / "venv" / "bin"
        constraint = ("--constraint", ROOT / "constraints.txt")
        done = call(programs / "python", "-m", "pip", "install", "--quiet", *constraint, *requirements)
        assert done.returncode == 0, done.stderr
        return programs

    return install


def test_the_wheel_has_every_module_and_the_sdist_what_makes_it(distributions):
    wheel, sdist = distributions
    held = {*zipfile.ZipFile(wheel).namelist()}
    wanted = {path.relative_to(ROOT) for path in (ROOT / "tqexport").rglob("*") if path.suffix in SUFFIXES}
    wanted |= {f"tqexport/{path.relative_to(ROOT)}" for path in (ROOT / "cli").glob("*.py")}
    assert {*map(str, wanted), "tqexport/py.typed"} - held == set()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "cli/verify.py", "tqexport/runtime.py"} - names == set()


def installed(programs):
    """Names of what an environment holds."""
    listed = call(programs / "python", "-m", "pip", "list", "--format", "freeze").stdout
    return {line.partition("==")[0].lower() for line in listed.splitlines()}


@pytest.mark.parametrize(
    ("extra", "file", "absent"),
    [
        ("onnxruntime", "svhnq.onnx", {"torch", "tensorflow", "ai-edge-litert"}),
        ("litert", "svhnq.tflite", {"torch", "tensorflow", "onnx", "onnxruntime"}),
    ],
)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_device_takes_numpy_and_one_runtime(distributions, environment, tmp_path, extra, file, absent, kind):
    programs = environment(f"{distributions[kind == 'sdist']}[{extra}]")
    assert installed(programs) & absent == set()
    done = call(programs / "python", "-c", PROGRAM, DATA / "v0.1" / file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{bits} (1, 10)" for bits in (1, 2, 4, 8)]
    cut = call(programs / "tqexport", "truncate", DATA / "v0.1" / file, "--bits", "2", "-o", tmp_path / "cut")
    assert cut.returncode == 0, cut.stderr
    refused = call(programs / "tqexport", "onnx", DIGITS, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (4, "")
    assert refused.stderr.strip().endswith("pip install 'tqexport[onnx]'")
    assert len(refused.stderr.splitlines()) == 1


def test_the_base_installation_has_no_framework_and_says_what_each_command_lacks(distributions, environment, tmp_path):
    programs = environment(distributions[0])
    frameworks = {"torch", "tensorflow", "onnx", "onnxruntime", "ai-edge-litert", "onnx2tf"}
    assert installed(programs) & frameworks == set()
    assert call(programs / "tqexport", "--help").returncode == 0
    for arguments, extra in (
        (["onnx", DIGITS], "onnx"),
        (["tflite", DIGITS], "tflite"),
        (["c", DIGITS], "torch"),
        (["verify", DIGITS], "onnx"),
        (["page", DIGITS], "onnx"),
        (["inspect", DIGITS], "torch"),
        (["inspect", DATA / "v0.1" / "svhnq.onnx"], "onnxruntime"),
        (["inspect", DATA / "v0.1" / "svhnq.tflite"], "litert"),
        (["truncate", DATA / "v0.1" / "svhnq.onnx"], "onnxruntime"),
    ):
        refused = call(programs / "tqexport", *arguments, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (4, ""), (arguments, refused.stderr)
        assert refused.stderr.strip().endswith(f"pip install 'tqexport[{extra}]'"), (arguments, refused.stderr)


def test_exporting_to_onnx_takes_no_tensorflow(distributions, environment, tmp_path):
    programs = environment(f"{distributions[0]}[onnx]")
    assert installed(programs) & {"tensorflow", "onnx2tf", "ai-edge-litert"} == set()
    for arguments in (["onnx", DIGITS, "--bits", "2,8"], ["verify", "--bits", "2", "--runtime", "onnxruntime"]):
        done = call(programs / "tqexport", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
