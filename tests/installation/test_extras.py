"""Each extra brings what it is for, and what is missing is named with the extra that brings it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from places import DATA, ROOT

from tqexport.errors import HostError
from tqexport.extras import EXTRAS, lacking, needs

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"ethos-u-vela": "ethosu", "pillow": "PIL"}  # of packages that are imported by another name


def modules_of(extra):
    """The modules that an extra brings, as pip would see it: those of other extras of ours included."""
    modules = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, inner = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name == "tqexport":
            modules |= {module for part in inner.split(",") for module in modules_of(part)}
        else:
            modules.add(MODULES.get(name, name.replace("-", "_")))
    return modules


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_tqexport_says_of_an_extra_is_what_pip_installs(extra):
    assert {*EXTRAS[extra]} == modules_of(extra)


def test_all_is_every_extra_that_a_command_may_ask_for():
    assert modules_of("all") == {module for modules in EXTRAS.values() for module in modules}


def test_every_package_that_is_imported_is_one_that_we_ask_for():
    """Else nobody says what to install where it is missing."""
    asked_for = {*sys.stdlib_module_names, "tqexport", *modules_of("all"), *PROJECT["dependencies"]}
    asked_for |= {"google"}  # protobuf, of which the objects of onnx are made
    asked_for = {re.split(r"[>=]", name)[0] for name in asked_for}
    for path in [*ROOT.glob("tqexport/**/*.py"), *ROOT.glob("cli/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            unknown = {name.partition(".")[0] for name in names} - asked_for
            assert not unknown, f"{path.relative_to(ROOT)} imports {unknown}"


@pytest.mark.parametrize(
    ("module", "extra", "named"),
    [
        ("torch", None, "torch"),
        ("torch", "onnx", "onnx"),
        ("onnx", None, "onnxruntime"),
        ("tensorflow", "onnx", "tflite"),
    ],
)
def test_the_smallest_extra_or_the_one_that_the_command_needs_is_named(module, extra, named):
    error = lacking(ModuleNotFoundError(name=f"{module}.part"), extra)
    assert isinstance(error, HostError)
    assert str(error).endswith(f"pip install 'tqexport[{named}]'")


def test_modules_that_no_extra_brings_are_no_business_of_it():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needs("onnx"):
        import no_such_module  # noqa: F401


# Nothing can be imported but the standard library, tqexport and what is named.
ONLY = """
import sys

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "tqexport", *ALLOWED}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ALLOWED = sys.argv.pop(1).split(",")
sys.meta_path.insert(0, Only())
"""
SWITCH = """
import numpy as np
from tqexport.runtime import SwitchableModel

model = SwitchableModel(sys.argv[1])
shape = (1, 3, 40, 40) if sys.argv[1].endswith("onnx") else (1, 40, 40, 3)
for model.bits in model.widths:
    print(model.bits, model.run(np.ones(shape, np.float32)).shape)
"""
ONNXRUNTIME = "numpy,onnxruntime,onnx,google,ml_dtypes,typing_extensions,packaging,flatbuffers"
LITERT = "numpy,ai_edge_litert,flatbuffers,google,ml_dtypes,typing_extensions,tqdm,backports"


@pytest.mark.parametrize(("file", "allowed"), [("svhnq.onnx", ONNXRUNTIME), ("svhnq.tflite", LITERT)])
def test_a_device_switches_widths_with_numpy_and_one_runtime(file, allowed):
    arguments = [sys.executable, "-c", ONLY + SWITCH, allowed, str(DATA / "v0.1" / file)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{bits} (1, 10)" for bits in (1, 2, 4, 8)]


def test_a_device_without_the_runtime_is_told_what_to_install():
    arguments = [sys.executable, "-c", ONLY + SWITCH, "numpy", str(DATA / "v0.1" / "svhnq.tflite")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tqexport.errors.HostError: this machine lacks ")
    assert last.endswith("pip install 'tqexport[litert]'")


CALL = """
from tqexport.cli import main

main()
"""
BASE = "numpy,click,rich,pygments,markdown_it,mdurl"


@pytest.mark.parametrize("command", ["inspect", "truncate", "split"])
def test_a_device_without_pytorch_refuses_what_is_no_artifact(tmp_path, command):
    (tmp_path / "empty.onnx").touch()
    arguments = [sys.executable, "-c", ONLY + CALL, BASE, command, str(tmp_path / "empty.onnx")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.strip().endswith("empty.onnx is not a valid ONNX, TFLite or C file; export it again")


def test_a_device_without_pytorch_reads_what_a_c_file_says(calibrated, tmp_path):
    from tqexport.backends.c.source import render_c
    from tqexport.facts import facts_of_model
    from tqexport.integer.build import integer_model

    facts = facts_of_model(calibrated, 2, "channels last", "integer")
    (tmp_path / "net.c").write_text(render_c([integer_model(calibrated, 2)], "net", facts).source)
    arguments = [sys.executable, "-c", ONLY + CALL, BASE, "inspect", str(tmp_path / "net.c")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 bits fixed" in done.stdout
