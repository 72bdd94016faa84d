"""The report: one whole page that loads nothing from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser

from commands import run
from damage import LAYER, changed_onnx, flip_a_bit, replace_artifact
from places import DIGITS_DATA, files


class Page(HTMLParser):
    """What a page is made of."""

    void = frozenset({"meta", "link", "img", "br", "input", "source", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for name, v in attributes if name in ("src", "href", "xlink:href", "data", "srcset") and v]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.remove(tag) if tag in self.open and tag not in self.void else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_whole_page(exported):
    before = files(exported)
    done = run("verify", "out", "--bits", "2,8", "--data", DIGITS_DATA, "--report", "report.html", cwd=exported)
    assert done.returncode == 0, done.stdout + done.stderr
    content = (exported / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    page.close()
    assert page.open == []
    assert all(link.startswith("#") for link in page.links), page.links
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "@import" not in content
    assert "url(http" not in content
    assert str(exported) not in content
    assert page.tags.count("svg") == 7  # accuracy, size, latency, flips, layers, and the weights of two widths
    assert 'name="viewport"' in content
    assert "prefers-color-scheme: dark" in content
    text = " ".join(page.text)
    for expected in (
        "PASS: every artifact equals PyTorch", "ckpt-w2.onnx", "ckpt-w8.tflite", "layers.1.conv1", "Accuracy by width",
        "Size by width", "Error by layer", "Weights at 2 bits", "Weights at 8 bits", "Latency by width", "onnxruntime",
    ):  # fmt: skip
        assert expected in text, expected
    assert files(exported) == sorted([*before, "report.html"])


def test_a_report_of_a_failure_says_what_is_wrong(exported):
    codes = f"{LAYER}.weight.codes"
    replace_artifact(exported / "out", "ckpt-w4.onnx", lambda content: changed_onnx(content, codes, flip_a_bit))
    done = run("verify", "out", "--bits", "4", "--samples", "4", "--report", "r.html", cwd=exported)
    assert done.returncode == 1
    content = (exported / "r.html").read_text(encoding="utf-8")
    assert f"layer {LAYER}: 1 of 9216 codes differ" in content
    assert "verdict failed" in content
