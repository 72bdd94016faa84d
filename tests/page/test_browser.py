"""The page in Chromium: what it says is what onnxruntime says in Python. Needs npm, Chromium and playwright."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from networks import model_of, one_dimensional, randomize_
from PIL import Image
from places import DIGITS, DIGITS_DATA, DIGITS_INT

from tqexport import load_checkpoint, prepare
from tqexport.backends.onnx.web_package import find_package
from tqexport.errors import HostError
from tqexport.page.build import build_page, write_page
from tqexport.verification.samples import noise, read_samples
from tqexport.verification.trial import project_of

WIDTHS = range(1, 9)
NOTHING = "\N{EN DASH}"
PHONE = {"width": 390, "height": 844}
pytestmark = pytest.mark.package


@pytest.fixture(scope="module")
def package():
    try:
        return find_package()
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def address(package, serve, tmp_path_factory):
    """Pages of three networks, given out by Python's server: /integer/, /exact/ and /sequence/."""
    root = tmp_path_factory.mktemp("pages")
    digits = read_samples(DIGITS_DATA, load_checkpoint(DIGITS).info.signature)
    integers = load_checkpoint(DIGITS_INT)
    exact = load_checkpoint(DIGITS)
    names = ("<b>zero</b>", *(f"a name of some length {i}" for i in range(1, 10)))
    exact = replace(exact, info=replace(exact.info, class_names=names))
    network = randomize_(prepare(one_dimensional(), (2, 8)), 0)
    sequence = model_of(network, (3, 14), (2, 8))
    for name, model, samples in (
        ("integer", integers, digits),
        ("exact", exact, None),
        ("sequence", sequence, noise(4, sequence.info.signature)),
    ):
        write_page(root / name, build_page(project_of(model), samples, package, 60))
    return serve(root), root


@pytest.fixture
def visit(browser, address):
    """Opens a page; whatever goes wrong in it, or asks another server, fails the test."""
    wrong, contexts = [], []

    def open_page(name, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address[0], "data:", "blob:")) else wrong.append(request.url)
            ),
        )
        page.goto(f"{address[0]}/{name}/")
        page.wait_for_selector("#content:not([hidden])", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


class Expected:
    """What onnxruntime makes of an input with the files of a page."""

    def __init__(self, folder):
        self.folder, self.facts = folder, json.loads((folder / "facts.json").read_text())
        self.sessions = {}

    def __call__(self, raw, bits):
        (model,) = [model for model in self.facts["models"] if bits in model["widths"]]
        session = self.sessions.setdefault(model["file"], ort.InferenceSession(self.folder / model["file"]))
        inputs = raw
        if how := self.facts["normalization"]:
            inputs = (raw - np.float32(how["mean"])) / np.float32(how["std"])
        feeds = {"bits": np.array(bits, np.uint8)} if model["switched"] else {}
        return session.run(["output"], {"input": inputs.astype(np.float32), **feeds})[0]

    def samples(self):
        shape = self.facts["inputs"][0]["shape"]
        return np.fromfile(self.folder / "samples-input.bin", "<f4").reshape(-1, *shape)


def move_to(page, index):
    """Move the slider with the arrow keys."""
    page.focus("#width")
    while (now := int(page.input_value("#width"))) != index:
        page.keyboard.press("ArrowRight" if now < index else "ArrowLeft")


def read(page, bits):
    """Class and outputs that the page shows of a width, once it does."""
    page.wait_for_selector(f'#class[data-bits="{bits}"]')
    return page.inner_text("#class"), np.float32(json.loads(page.get_attribute("#class", "data-outputs")))


def step_of_outputs(outputs):
    """The smallest step between different outputs of an integer file."""
    return np.diff(np.unique(outputs)).min()


def test_the_slider_shows_what_onnxruntime_computes_at_every_width(visit, address):
    page, expected = visit("integer"), Expected(address[1] / "integer")
    samples, labels = expected.samples(), expected.facts["samples"]["labels"]
    page.focus("#strip input")
    for row in range(3):
        if row:
            page.focus("#strip :checked")
            page.keyboard.press("ArrowRight")
        for bits in (*WIDTHS, 8):
            move_to(page, bits - 1)
            assert page.inner_text("#width-text") == page.get_attribute("#width", "aria-valuetext")
            assert page.inner_text("#width-text").split()[0] == str(bits)
            wanted = expected(samples[row : row + 1], bits)[0]
            page.wait_for_function(
                "wanted => document.getElementById('announcement').textContent.includes(wanted)", arg=f"At {bits} bit"
            )
            shown, outputs = read(page, bits)
            assert shown == str(wanted.argmax())
            if bits < 8:
                assert np.array_equal(outputs, wanted)
            else:
                assert np.abs(outputs - wanted).max() <= 1.001 * step_of_outputs(expected(samples, 8))
            assert ("right" if shown == str(labels[row]) else "wrong") in page.inner_text("#truth")


def test_the_table_counts_what_python_counts(visit, address):
    page, expected = visit("integer"), Expected(address[1] / "integer")
    page.locator("#facts").scroll_into_view_if_needed()
    page.wait_for_selector("#table-panel[data-done]", timeout=120_000)
    classes = {bits: expected(expected.samples(), bits).argmax(1) for bits in WIDTHS}
    labels = np.array(expected.facts["samples"]["labels"])
    for bits in WIDTHS:
        cells = page.locator(f'#rows tr[data-bits="{bits}"] td').all_inner_texts()
        _, size, milliseconds, agreement, accuracy = (cell.strip() for cell in cells)
        sizes = expected.facts["bytes"][str(bits)]
        assert size.split()[0] == f"{sizes['packed'] or sizes['fixed']:,}"
        assert 0 < float(milliseconds) < 1000
        assert agreement == f"{100 * (classes[bits] == classes[8]).mean():.1f} %"
        assert accuracy == f"{100 * (classes[bits] == labels).mean():.1f} %"
    move_to(page, 1)
    assert page.inner_text("#agreement") == f"{100 * (classes[2] == classes[8]).mean():.1f} %"


def drawing(page):
    """What is on the canvas, as a picture."""
    size = page.evaluate("[canvas.height, canvas.width]")
    data = page.evaluate("Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)")
    return Image.fromarray(np.uint8(data).reshape(*size, 4)[..., :3])


def as_samples(folder, picture, signature):
    """What verify --data makes of a picture, before normalisation."""
    (folder / "0").mkdir(exist_ok=True)
    picture.save(folder / "0" / "picture.png")
    return read_samples(folder, signature).inputs[0]


def test_what_is_drawn_goes_the_way_of_pictures(visit, address, digits, tmp_path):
    page, expected = visit("exact"), Expected(address[1] / "exact")
    assert page.inner_text("#class") == NOTHING
    box = page.locator("#canvas").bounding_box()
    corners = [(0.25, 0.15), (0.75, 0.15), (0.6, 0.45), (0.45, 0.9)]  # a seven
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()
    raw = as_samples(tmp_path, drawing(page), digits.info.signature)
    for bits in WIDTHS:
        move_to(page, bits - 1)
        shown, outputs = read(page, bits)
        wanted = expected(raw, bits)[0]
        assert shown == expected.facts["class_names"][wanted.argmax()] == "a name of some length 7"
        assert np.abs(outputs - wanted).max() < 0.1  # floats may put an activation on the other side of a boundary
    assert page.inner_text("#agreement") == "8 of 8"
    assert page.locator("#classes .name").first.inner_text() == "<b>zero</b>"  # names are text, whatever is in them
    page.click("#clear")
    assert page.inner_text("#class") == NOTHING


def test_a_picture_is_taken_as_verify_takes_it(visit, address, digits, tmp_path):
    page, expected = visit("exact"), Expected(address[1] / "exact")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 31, 3), np.uint8)
    raw = as_samples(tmp_path, Image.fromarray(pixels), digits.info.signature)
    page.set_input_files("#picture", tmp_path / "0" / "picture.png")
    outputs = read(page, 8)[1]
    assert np.abs(outputs - expected(raw, 8)[0]).max() < 0.1
    page.wait_for_selector("#invert-tool:not([hidden])")
    page.check("#invert")
    inverted = as_samples(tmp_path, Image.fromarray(255 - pixels), digits.info.signature)
    page.wait_for_function(
        "before => document.getElementById('class').dataset.outputs !== before",
        arg=json.dumps([float(x) for x in outputs]),
    )
    assert np.abs(read(page, 8)[1] - expected(inverted, 8)[0]).max() < 0.1


def test_sequences_are_chosen_among_samples(visit, address):
    page, expected = visit("sequence"), Expected(address[1] / "sequence")
    assert not page.is_visible("#canvas")
    assert "takes no pictures (input 3 \N{MULTIPLICATION SIGN} 14)" in page.inner_text("#input-note")
    page.focus("#strip input")
    page.keyboard.press("ArrowRight")
    for index, bits in enumerate((2, 8)):
        move_to(page, index)
        shown, outputs = read(page, bits)
        wanted = expected(expected.samples()[1:2], bits)[0]
        page.wait_for_timeout(200)
        assert shown == f"class {wanted.argmax()}"
        assert np.allclose(outputs, wanted, atol=1e-3)


def test_everything_is_reached_by_tab(visit):
    page = visit("integer")
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        )
    wanted = ["width", "clear", "picture", "sample"]
    assert [name for name in reached if name in wanted][:4] == wanted


@pytest.mark.parametrize("name", ["integer", "exact", "sequence"])
def test_phones_and_the_dark(visit, name):
    colours = []
    for scheme in ("light", "dark"):
        page = visit(name, viewport=PHONE, color_scheme=scheme)
        page.locator("#facts").scroll_into_view_if_needed()
        page.wait_for_selector("#table-panel[data-done]", timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        colours.append(
            page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        )
    (light, ink), (dark, chalk) = colours
    assert brightness(light) > 200 > 60 > brightness(ink)
    assert brightness(dark) < 60 < 200 < brightness(chalk)


def brightness(colour):
    return np.mean([float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]])
