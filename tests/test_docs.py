"""The pages are what is so: the command reference, the programs, the names, the refusals; and the site builds."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from commands import run
from places import DIGITS, DIGITS_DATA, ROOT, artifact
from programs import program
from tqexport.cli import cli

from tqexport.backends.onnx.web_package import VERSION
from tqexport.runtime import SwitchableModel

DOCS = ROOT / "docs"


def load(name):
    """One of the scripts in docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


commands, hooks = load("make_commands"), load("mkdocs_hooks")
PAGE = (DOCS / "commands.md").read_text(encoding="utf-8")
# Examples that take little time; tests/cli/ has the others, whose output also holds times.
CHEAP = ("truncate", "inspect", "gap", "calibrate", "c", "convert", "check")


def test_the_command_reference_has_every_command_as_it_is():
    assert re.findall(r"^## tqexport (\S+)$", PAGE, re.MULTILINE) == [*cli.commands], "run make commands"
    for name in cli.commands:
        assert commands.section(name, "").partition("```console")[0] in PAGE, f"{name} has changed: run make commands"
        assert f"```console\n$ tqexport {commands.EXAMPLES[name]}\n" in PAGE, (
            f"{name} has no example: run make commands"
        )


def test_the_examples_print_what_the_page_shows(runtime_files, tmp_path):
    shutil.copy(DIGITS, tmp_path / "ckpt.pt")
    shutil.copy(DIGITS_DATA, tmp_path / "samples.npz")
    shutil.copytree(runtime_files, tmp_path / "tqexport-out")
    for name in CHEAP:
        done = run(*commands.EXAMPLES[name].split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert commands.section(name, commands.tidy(done.stdout)) in PAGE, f"{name} prints otherwise: run make commands"


@pytest.fixture(scope="module")
def device(exported_once, runtime_files, calibrated, tmp_path_factory):
    """A folder with files of every make and samples that they are run on."""
    from tqexport.backends.tflite.integer_form import integer_tflite

    folder = tmp_path_factory.mktemp("device")
    for kind in ("onnx", "tflite"):
        (folder / f"fixed.{kind}").write_bytes(artifact(exported_once, kind, 2))
        shutil.copy(runtime_files / f"ckpt.{kind}", folder / f"all.{kind}")
    (folder / "integers.tflite").write_bytes(integer_tflite(calibrated, 2, "integer"))
    shutil.copy(DIGITS_DATA, folder / "samples.npz")
    return folder


def accuracy(device, file, samples, bits=2):
    """What tqexport itself makes of the samples with a file, in the programs' words."""
    inputs = samples.inputs if file.endswith("onnx") else np.moveaxis(samples.inputs, 1, -1)
    outputs = SwitchableModel(device / file, bits).run(inputs)
    return f"{100 * (outputs.argmax(1) == samples.labels).mean():.1f} %"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run_onnx", ["fixed.onnx"]),
        ("run_onnx", ["all.onnx", "2"]),
        ("run_litert", ["fixed.tflite"]),
        ("run_litert", ["all.tflite", "2"]),
    ],
)
def test_programs_without_tqexport_classify_as_it_does(device, digits_samples, name, arguments):
    (device / f"{name}.py").write_text(program("python", name))
    assert "tqexport import" not in program("python", name)
    done = subprocess.run([sys.executable, f"{name}.py", *arguments], cwd=device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == accuracy(device, arguments[0], digits_samples)


def test_the_program_for_litert_takes_integers(device):
    (device / "run_litert.py").write_text(program("python", "run_litert"))
    arguments = [sys.executable, "run_litert.py", "integers.tflite"]
    done = subprocess.run(arguments, cwd=device, capture_output=True, text=True)
    assert float(done.stdout.split()[0]) > 98, done.stderr


@pytest.mark.parametrize("file", ["all.onnx", "all.tflite"])
def test_the_program_with_tqexport_switches(device, digits_samples, file):
    (device / "run_switching.py").write_text(program("python", "run_switching"))
    done = subprocess.run([sys.executable, "run_switching.py", file], cwd=device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{bits} bits" for bits in range(1, 9)]
    assert lines[0].endswith(accuracy(device, file, digits_samples, 1))


@pytest.mark.package  # installs onnxruntime-web
@pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed")
def test_the_javascript_program_gives_the_answer_of_onnxruntime(device):
    subprocess.run(["npm", "install", "--silent", f"onnxruntime-web@{VERSION}"], cwd=device, check=True)
    (device / "run.mjs").write_text(program("js", "run.mjs"))
    sample = np.full((1, 1, 8, 8), 0.5, np.float32)
    for file, feeds in (("all.onnx", {"bits": np.array(3, np.uint8)}), ("fixed.onnx", {})):
        done = subprocess.run(["node", "run.mjs", file, "3"], cwd=device, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (expected,) = ort.InferenceSession(device / file).run(None, {"input": sample, **feeds})
        assert np.allclose(json.loads(done.stdout), expected[0], atol=1e-5)


DEBIAN = "http://deb.debian.org/debian/pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb"
DEBIAN_SHA256 = "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08"


@pytest.fixture
def onnxruntime_headers(tmp_path):
    """The folder of the C++ headers: installed ones, or those of Debian's package, which are the same everywhere."""
    installed = Path("/usr/include/onnxruntime")
    if (installed / "onnxruntime_cxx_api.h").exists():
        return installed
    if shutil.which("dpkg-deb") is None:
        pytest.skip("onnxruntime's headers are not installed, and there is no dpkg-deb to unpack them with")
    try:
        with urllib.request.urlopen(DEBIAN, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        pytest.skip(f"onnxruntime's headers are not installed and cannot be had from {DEBIAN}: {error}")
    assert hashlib.sha256(content).hexdigest() == DEBIAN_SHA256
    (tmp_path / "headers.deb").write_bytes(content)
    subprocess.run(["dpkg-deb", "-x", "headers.deb", "unpacked"], cwd=tmp_path, check=True)
    return tmp_path / "unpacked" / installed.relative_to("/")


@pytest.fixture
def onnxruntime_library(tmp_path):
    """A folder with the library of the installed onnxruntime under the names that linker and loader look for."""
    libraries = [*(Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*")]
    if not libraries:
        pytest.skip("the installed onnxruntime has no shared library for Linux")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(libraries[0])
    return tmp_path


@pytest.mark.package  # fetches headers
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
def test_the_cpp_program_gives_the_scores_of_onnxruntime(device, onnxruntime_headers, onnxruntime_library):
    source = program("cpp", "run.cpp")
    (device / "run.cpp").write_text(source)
    build = re.match(r"// (c\+\+ .*) && \./run FILE \[BITS\]\n", source)[1].split()
    places = {
        **os.environ,
        "CPLUS_INCLUDE_PATH": str(onnxruntime_headers),
        "LIBRARY_PATH": str(onnxruntime_library),
        "LD_LIBRARY_PATH": str(onnxruntime_library),
    }
    built = subprocess.run([*build, "-Wall", "-Wextra"], cwd=device, env=places, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    sample = np.full((1, 1, 8, 8), 0.5, np.float32)
    for file, bits in (("fixed.onnx", None), ("all.onnx", 1), ("all.onnx", 3), ("all.onnx", 8)):
        arguments, feeds = ([], {}) if bits is None else ([str(bits)], {"bits": np.array(bits, np.uint8)})
        done = subprocess.run(["./run", file, *arguments], cwd=device, env=places, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (expected,) = ort.InferenceSession(device / file).run(None, {"input": sample, **feeds})
        assert np.allclose([*map(float, done.stdout.split())], expected[0], rtol=0, atol=1e-5)


def test_every_public_name_has_a_page_in_the_api_reference():
    """The site makes a page of each that it reads from the source, and fails where one has no docstring."""
    modules = [module for page in (DOCS / "api").glob("*.md") for module in hooks.modules_of(page)]
    assert {"tqexport", "tqexport.runtime"} < {*modules}
    for module in modules:
        assert [*hooks.public_names(module)] == [*importlib.import_module(module).__all__]


def test_sentences_that_pages_quote_are_those_that_refuse():
    refusals = [*hooks.refusals()]
    assert {code for code, _, _ in refusals} == {2, 3, 4}
    sentences = {sentence for _, _, sentence in refusals}
    page = (DOCS / "your-network.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.*?)` \| (?!`)", page.partition("When something is refused")[2], re.MULTILINE)
    assert len(quoted) > 5
    for quote in quoted:
        parts = quote.split("…")
        assert any(all(part in sentence for part in parts) for sentence in sentences), quote


def test_links_lead_somewhere():
    """Quickly, what make docs proves of anchors, too."""
    pages = [
        *DOCS.rglob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "benchmarks" / "README.md",
        ROOT / "experiments" / "README.md",
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not re.match(r"https?:|#", target):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"
