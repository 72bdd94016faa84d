"""What tqexport page writes, and what it refuses; test_browser.py opens it in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import resource
import shutil
import subprocess

import numpy as np
import onnxruntime as ort
import pytest
from commands import run
from networks import model_of, one_dimensional, randomize_
from PIL import Image
from places import DIGITS, DIGITS_DATA, DIGITS_INT, ROOT, files
from torch import nn
from web_copy import web_copy

from tqexport import CheckpointInfo, InputInfo, Scheme, TruncModel, prepare
from tqexport.backends.onnx.web_package import find_package
from tqexport.errors import HostError, InputError, UsageError
from tqexport.model import Normalization
from tqexport.page.build import Page, build_page, check_page, write_page
from tqexport.verification.samples import Samples, noise, read_samples
from tqexport.verification.trial import project_of

ASSETS = ROOT / "tqexport" / "page" / "assets"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in which a page was made of the network of integers."""
    folder = tmp_path_factory.mktemp("page")
    web_copy(folder / "web")
    line = ("page", DIGITS_INT, "--data", DIGITS_DATA, "--samples", "20", "--onnxruntime-web", "web", "-o", "new/page")
    done = run(*line, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.json").write_text(done.stdout)
    return folder


def facts_of(page):
    return json.loads((page / "facts.json").read_text())


def test_the_folder_holds_all_that_the_page_reads(written):
    page = written / "new" / "page"
    facts = facts_of(page)
    assert {*files(page)} == {*facts["files"], "facts.json"}
    for name, digest in facts["files"].items():
        assert hashlib.sha256((page / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in ASSETS.iterdir()} <= {*facts["files"]}
    assert facts["runtime"] == {"name": "onnxruntime-web", "version": "0.1.2", "folder": "onnxruntime-web"}
    assert (page / "onnxruntime-web" / "ort-wasm-simd-threaded.wasm").read_text() == "not ort-wasm-simd-threaded.wasm"
    assert files(written) == sorted(
        [
            *(f"new/page/{name}" for name in files(page)),
            "said.json",
            *(f"web/{name}" for name in files(written / "web")),
        ]
    )
    document = json.loads((written / "said.json").read_text())
    assert [entry["file"] for entry in document["files"]] == files(page)
    assert (document["widths"], document["samples"], document["kernel"]) == ([*range(1, 9)], 20, "integer")


def test_the_facts_are_those_of_the_files_that_are_exported(written, tmp_path):
    page = written / "new" / "page"
    facts = facts_of(page)
    for bits in ("runtime", "2,8"):
        assert run("onnx", DIGITS_INT, "--bits", bits, "-o", "out", cwd=tmp_path).returncode == 0
    whole, widest = facts["models"]
    assert [whole["widths"], widest["widths"]] == [[*range(1, 8)], [8]]
    for model in facts["models"]:
        assert (page / model["file"]).read_bytes() == (tmp_path / "out" / model["file"]).read_bytes()
        assert model["bytes"] == (page / model["file"]).stat().st_size
    for bits in (2, 8):
        assert (
            facts["bytes"][str(bits)]["fixed"]
            == (tmp_path / "out" / f"digits-resnet8-int-w{bits}-integer.onnx").stat().st_size
        )
    assert (
        run("onnx", DIGITS_INT, "--bits", "2", "--kernel", "integer-packed", "-o", "out", cwd=tmp_path).returncode == 0
    )
    packed = tmp_path / "out" / "digits-resnet8-int-w2-integer-packed.onnx"
    assert facts["bytes"]["2"]["packed"] == packed.stat().st_size < facts["bytes"]["2"]["fixed"]
    assert facts["bytes"]["8"]["packed"] is None


def test_the_samples_are_from_all_over_the_file_and_before_normalisation(written, digits):
    page = written / "new" / "page"
    facts = facts_of(page)
    rows = np.arange(20) * 450 // 20
    chosen = read_samples(DIGITS_DATA, digits.info.signature)
    stored = np.fromfile(page / "samples-input.bin", "<f4").reshape(20, 1, 8, 8)
    assert np.array_equal(stored, chosen.inputs[0][rows])
    assert facts["samples"]["labels"] == chosen.labels[rows].tolist()
    samples = Samples((stored,), np.array(facts["samples"]["labels"]), "").normalized(
        Normalization(**{key: tuple(values) for key, values in facts["normalization"].items()})
    )
    outputs = ort.InferenceSession(page / facts["models"][1]["file"]).run(["output"], {"input": samples.inputs[0]})
    assert (outputs[0].argmax(1) == samples.labels).mean() > 0.9


def test_a_page_replaces_an_earlier_one_whole_and_nothing_else(written, tmp_path):
    shutil.copytree(written / "new" / "page", tmp_path / "page")
    line = ("page", DIGITS_INT, "--onnxruntime-web", written / "web")
    done = run(*line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("to look at it: python3 -m http.server --directory page")
    assert {*files(tmp_path)} == {f"page/{name}" for name in (*facts_of(tmp_path / "page")["files"], "facts.json")}
    assert facts_of(tmp_path / "page")["samples"] is None
    before = files(tmp_path)
    for name in ("page/notes.txt", "mine/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        folder = name.partition("/")[0]
        refused = run(*line, "-o", folder, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.strip() == (
            f"tqexport: {folder} holds {name}, which is no part of a page; name another folder with --output"
        ).replace(name, "notes.txt")
    assert files(tmp_path) == sorted([*before, "page/notes.txt", "mine/notes.txt"])


def test_a_full_disk_leaves_the_earlier_page(written, tmp_path):
    shutil.copytree(written / "new" / "page", tmp_path / "page")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    page = Page({"index.html": b"new", "part/large.bin": bytes(20_000)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(HostError, match=r"cannot write the folder .*page: File too large"):
            write_page(tmp_path / "page", page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def copy_of(written):
    return find_package(written / "web")


def prepared(widths=(4, 8), scheme=Scheme()):
    return randomize_(prepare(one_dimensional(), widths, scheme=scheme), 0)


def test_what_nobody_can_draw_takes_samples(written, tmp_path):
    project = project_of(model_of(prepared(), (3, 14), (4, 8)))
    with pytest.raises(UsageError, match=r"takes float32 \(3, 14\), which nobody can draw; .* with --data"):
        check_page(tmp_path / "page", project, sampled=False)
    check_page(tmp_path / "page", project, sampled=True)
    page = build_page(project, noise(5, project.model.info.signature), copy_of(written))
    assert (page.facts["picture"], page.facts["samples"]["count"], page.facts["output"]["classes"]) == (False, 5, 2)


def test_codes_that_cannot_be_shifted_have_a_file_for_each_width(written):
    scheme = Scheme("dorefa")
    project = project_of(model_of(prepared(scheme=scheme), (3, 14), (4, 8), scheme))
    page = build_page(project, noise(1, project.model.info.signature), copy_of(written))
    assert [model["widths"] for model in page.facts["models"]] == [[4], [8]]


def test_a_network_without_classes_is_refused(written):
    network = randomize_(
        prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), (8,)),
        0,
    )
    with pytest.raises(
        InputError, match=r"network: the page shows classes, and the output output is float32 batchx2x4x4"
    ):
        build_page(project_of(model_of(network, (1, 10, 10), (8,))), None, copy_of(written))
    info = CheckpointInfo("test", {}, (3, 14), (8,), class_names=("a", "b", "c"))
    with pytest.raises(InputError, match="has 3 class names for 2 classes"):
        build_page(project_of(TruncModel(prepared((8,)).eval(), info)), None, copy_of(written))


def test_what_is_absent_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TQEXPORT_ONNXRUNTIME_WEB", raising=False)
    for number in range(2):
        refused = run("page", DIGITS, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (4, "")
        assert refused.stderr.startswith(
            "tqexport: npm, which fetches onnxruntime-web, is not installed; install Node.js"
        )
        assert len(refused.stderr.splitlines()) == 1
        # What lies in the cache and is not the package is not taken for it.
        kept = tmp_path / "cache" / "tqexport" / "onnxruntime-web-1.30.0"
        shutil.copytree(web_copy(tmp_path / f"web{number}") / "dist", kept, dirs_exist_ok=True)
    verified = run("verify", DIGITS, "--runtime", "web", cwd=tmp_path)
    assert (verified.returncode, verified.stdout, verified.stderr.count("\n")) == (4, "", 1)
    assert verified.stderr.startswith("tqexport: Node, which runs onnxruntime-web, is not installed (node); install")
    empty = run("page", DIGITS, "--onnxruntime-web", "cache", cwd=tmp_path)
    assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)
    assert "cache holds no onnxruntime-web" in empty.stderr
    monkeypatch.setenv("TQEXPORT_ONNXRUNTIME_WEB", str(tmp_path / "web0"))
    assert find_package().version == "0.1.2"
    assert not (tmp_path / "page").exists()


PICTURES = """
const { fromPicture, normalise } = await import(`data:text/javascript;base64,${process.argv[1]}`);
const { readFileSync, writeFileSync } = await import("node:fs");
for (const { name, size, shape, normalization } of JSON.parse(readFileSync("pictures.json"))) {
  const raw = fromPicture(new Uint8Array(readFileSync(`${name}.rgba`)), size, shape);
  writeFileSync(`${name}.raw`, raw);
  writeFileSync(`${name}.normal`, normalise(raw, shape[0], normalization));
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_makes_of_a_picture_what_verify_makes_of_it(tmp_path):
    generator = np.random.default_rng(0)
    cases = []
    for number, (size, shape) in enumerate(
        [
            ((8, 8), (1, 8, 8)),
            ((320, 320), (1, 8, 8)),
            ((33, 57), (3, 32, 32)),
            ((5, 9), (3, 16, 12)),
            ((64, 7), (1, 28, 28)),
        ]
    ):
        pixels = generator.integers(0, 256, (*size, 3), np.uint8)
        folder = tmp_path / f"pictures{number}" / "0"
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "picture.png")
        np.dstack([pixels, np.full(size, 255, np.uint8)]).tofile(tmp_path / f"{number}.rgba")
        mean, std = generator.random((2, shape[0])) + 0.1
        normalization = {"mean": mean.tolist(), "std": std.tolist()}
        cases.append({"name": str(number), "size": size, "shape": shape, "normalization": normalization})
    (tmp_path / "pictures.json").write_text(json.dumps(cases))
    module = base64.b64encode((ASSETS / "picture.js").read_bytes()).decode()
    line = ["node", "--input-type=module", "-e", PICTURES, module]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case in cases:
        name, shape = case["name"], case["shape"]
        expected = read_samples(tmp_path / f"pictures{name}", [InputInfo("input", shape)])
        normal = expected.normalized(Normalization(*(tuple(case["normalization"][key]) for key in ("mean", "std"))))
        for ending, samples in (("raw", expected), ("normal", normal)):
            made = np.fromfile(tmp_path / f"{name}.{ending}", np.float32).reshape(1, *shape)
            assert np.array_equal(made, samples.inputs[0]), (case, ending)
