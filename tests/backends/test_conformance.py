"""What every back end promises: those of the package, and one that these tests alone register."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from raw_backend import RawBackend
from tqexport.cli import cli
from tqexport.cli.export import export_command

from tqexport import ReadOptions, load_checkpoint, save_checkpoint
from tqexport.artifacts.manifest import read_manifest
from tqexport.artifacts.project import open_project
from tqexport.artifacts.truncate import open_artifact
from tqexport.backends import BACKENDS, backend_of
from tqexport.errors import InputError, UsageError
from tqexport.facts import ArtifactFacts, MultiWidthFacts
from tqexport.integer.calibration import calibrate
from tqexport.integer.names import is_integer
from tqexport.verification.codes import compare_codes, expected_codes

CHECKPOINT = Path(__file__).parent.parent / "data" / "svhnq.pt"
NAMES = ["onnx", "tflite", "c", "raw"]
WIDTHS = (1, 2, 4, 8)
MADE: dict[str, dict[str, bytes]] = {}  # what a back end exports is made once


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The back end that writes raw codes, registered as the others are."""
    monkeypatch.setitem(BACKENDS, "raw", RawBackend())


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def kernel(name):
    """The first kernel of a back end: the one that a file has whose name says none."""
    return next(iter(BACKENDS[name].kernels))


@pytest.fixture(scope="module")
def calibrated_file(tmp_path_factory):
    """The same network with grids."""
    model = load_checkpoint(CHECKPOINT)
    inputs = np.random.default_rng(0).normal(size=(16, 3, 40, 40)).astype(np.float32)
    path = tmp_path_factory.mktemp("calibrated") / "net.pt"
    calibrated = calibrate(model, inputs)
    save_checkpoint(path, calibrated.module, calibrated.info)
    return path


@pytest.fixture
def project(tmp_path, request):
    integers = "kernel" in request.fixturenames and is_integer(request.getfixturevalue("kernel"))
    shutil.copy(request.getfixturevalue("calibrated_file") if integers else CHECKPOINT, tmp_path / "net.pt")
    return open_project(tmp_path / "net.pt", tmp_path / "out", ReadOptions())


@pytest.fixture
def files(name, kernel, project):
    """The fixed file of each width."""
    if name not in MADE:
        MADE[name] = dict(project.make(name, WIDTHS, kernel))
    return MADE[name]


def test_files_are_recognised_by_their_back_end_alone(name, files):
    for content in files.values():
        assert backend_of(content) is BACKENDS[name]
        assert [other for other in NAMES if BACKENDS[other].recognises(content)] == [name]


def test_the_same_checkpoint_gives_the_same_bytes(name, kernel, files, project):
    assert dict(project.make(name, [4], kernel)) == {4: files[4]}


def test_a_width_that_the_checkpoint_lacks_is_refused(name, kernel, project):
    with pytest.raises(InputError, match="no 3-bit BatchNorm"):
        list(project.make(name, [3], kernel))


def test_a_file_says_what_it_is(name, files, project):
    for bits, content in files.items():
        facts = BACKENDS[name].facts(content)
        assert isinstance(facts, ArtifactFacts)
        assert (facts.width, facts.activation_width, facts.batch_norm_width) == (bits, bits, bits)
        assert (facts.architecture, facts.checkpoint_sha256) == ("svhnq", project.model.sha256)
        assert facts.layout == BACKENDS[name].layout
        inputs, _ = BACKENDS[name].describe(content)
        assert sorted(map(str, inputs[0].shape[1:])) == ["3", "40", "40"]
        assert inputs[0].dtype == ("int8" if name == "c" else "float32")


def test_codes_are_those_of_the_checkpoint_and_a_changed_one_is_named(name, files, project):
    for bits, content in files.items():
        expected, problems = expected_codes(project.model, bits), {}
        codes = BACKENDS[name].codes(content, bits)
        assert compare_codes(expected, bits, codes, problems) == (32_368, 0)
        assert problems == {}
        changed = {weight: [np.array(place) for place in places] for weight, places in codes.items()}
        changed["layers.13.weight"][0].flat[77] ^= 1 if changed["layers.13.weight"][0].dtype == np.uint8 else 2
        assert compare_codes(expected, bits, changed, problems)[1] == 1
        assert list(problems) == ["layers.13"]
        del changed["layers.10.weight"]
        compare_codes(expected, bits, changed, problems)
        assert "layer layers.10 has no codes in the file" in problems.values()


def test_a_truncated_file_is_refused(name, files):
    with pytest.raises(InputError):
        BACKENDS[name].codes(files[4][: len(files[4]) // 2], 4)
    for read in (BACKENDS[name].facts, BACKENDS[name].describe):
        with pytest.raises(InputError):
            read(files[4][:60])


def test_one_file_holds_every_width_or_the_format_says_that_it_cannot(name, kernel, files, project):
    try:
        artifact = project.export_runtime(name, kernel)
    except UsageError as error:
        assert "cannot hold several widths" in str(error)  # noqa: PT017
        assert not list(project.folder.iterdir())
        return
    held = open_artifact(project.folder / artifact.file)
    assert isinstance(held.facts, MultiWidthFacts)
    assert (held.widths, held.own) == (WIDTHS, None)
    for bits, fixed in files.items():
        if held.backend.cuts:
            assert held.truncate(bits) == fixed
        else:
            with pytest.raises(UsageError, match="nothing is cut from"):
                held.truncate(bits)
        assert held.facts_at(bits) == BACKENDS[name].facts(fixed)
        expected, problems = expected_codes(project.model, bits), {}
        compare_codes(expected, bits, BACKENDS[name].codes(held.content, bits), problems)
        assert problems == {}


def test_a_fixed_file_holds_other_widths_or_the_format_says_that_it_cannot(name, kernel, files, project):
    try:
        (artifact,) = project.export(name, [4], kernel, truncatable=True)
    except UsageError as error:
        assert "--bits runtime" in str(error)  # noqa: PT017
        assert not project.folder.exists()
        return
    assert artifact.truncatable_to == (1, 2, 8)
    held = open_artifact(project.folder / artifact.file)
    assert (held.widths, held.own) == (WIDTHS, 4)
    assert all(held.truncate(bits) == fixed for bits, fixed in files.items())


def test_what_runs_computes_what_pytorch_does_and_what_does_not_says_so(name, files, project):
    session, runner = (opened(files[4]) for opened in (BACKENDS[name].open_session, BACKENDS[name].open_runner))
    stretches = BACKENDS[name].open_stretches(files[4], None, [])
    assert (session is None) == (runner is None) == (stretches is None) == (name in ("raw", "c"))
    if runner is None:
        return
    x = np.random.default_rng(0).random((2, 3, 40, 40), np.float32)
    in_layout = x if BACKENDS[name].layout == "channels first" else np.moveaxis(x, 1, -1)
    outputs = session.run((np.ascontiguousarray(in_layout),))[0]
    assert np.array_equal(outputs, runner.run_untouched((x,))[0])
    assert np.array_equal(outputs, stretches((x,), {})[0][0])
    assert np.array_equal(outputs, runner.run((x,)).output)


def command(*arguments):
    """The command line in this process: exit code, and what it printed."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.return_value or 0, done.stdout


def test_a_back_end_passes_through_every_command(name, kernel, project, monkeypatch):
    if name == "c" and shutil.which("cc") is None:
        pytest.skip("there is no C compiler to verify with")
    monkeypatch.chdir(project.checkpoint.parent)
    done = CliRunner().invoke(export_command(BACKENDS[name]), ["net.pt", "--bits", "2,4", "--json"])
    assert done.exit_code == 0, done.output
    manifest = read_manifest(Path("tqexport-out"))
    written = [artifact for artifact in manifest.artifacts if artifact.kind == name]
    assert [artifact.file for artifact in written] == [f"net-w{bits}.{name}" for bits in (2, 4)]
    for artifact in written:
        path = Path("tqexport-out", artifact.file)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256
        code, printed = command("inspect", path, "--json")
        said = json.loads(printed)
        assert (code, said["format"], said["widths"]) == (0, name, list(artifact.widths))
        assert sum(int(np.prod(shape)) for shape in said["weights"].values()) >= 32_368
        assert command("inspect", path)[0] == 0

    code, printed = command("verify", "--bits", "4", "--samples", "2", "--json")
    checked = {check["artifact"]: check for check in json.loads(printed)["results"]}
    own = checked[f"net-w4.{name}"]
    assert (code, own["passed"], own["temporary"]) == (0, True, False)
    assert own["as_deployed"]["codes"] == 32_368
    assert (own["latency_ms"] is None) == (name == "raw")
    assert command("verify", "--bits", "4", "--samples", "2", "--report", "report.html")[0] == 0


def test_a_changed_code_in_a_file_that_nothing_runs_is_a_failed_verification(project, monkeypatch):
    monkeypatch.chdir(project.checkpoint.parent)
    list(project.export("raw", [4]))
    path = project.folder / "net-w4.raw"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last code of the last weight, in the order of their names
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not the file that was exported"):
        command("verify", "out", "--bits", "4", "--samples", "2")
    manifest = json.loads((project.folder / "tqexport.json").read_text())
    manifest["artifacts"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (project.folder / "tqexport.json").write_text(json.dumps(manifest))
    code, printed = command("verify", "out", "--bits", "4", "--samples", "2")
    assert code == 1
    assert "layer layers.6: 1 of 576 codes differ" in printed
    assert "FAIL: net-w4.raw at 4 bits differs from PyTorch, first in layers.6" in printed
