"""The zoo's page is of the zoo; `make zoo` runs every network, and here runs one that costs little."""

from __future__ import annotations

import re

import pytest
from entry import EXACT
from places import ROOT
from zoo import ENTRIES, Outcome, run_entry

CHEAP = ("top-k",)


def test_the_page_has_every_network_with_what_is_expected_of_it():
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!network|---)(.*?) \| .*? \| (.*?) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == [entry.name for entry in ENTRIES], "run make zoo"
    for entry, (_, *outcomes) in zip(ENTRIES, rows, strict=True):
        assert Outcome(*outcomes).as_expected(entry), f"{entry.name} is expected otherwise: run make zoo"


def test_the_zoo_is_broad():
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES) >= 60
    assert sum(entry.onnx == entry.tflite == EXACT for entry in ENTRIES) >= 40


@pytest.mark.parametrize("name", CHEAP)
def test_a_network_comes_out_as_expected(name):
    (entry,) = [entry for entry in ENTRIES if entry.name == name]
    outcome = run_entry(entry, rewritten=True)
    assert outcome.as_expected(entry), outcome
    assert outcome.rewritten == "parameters equal"
    assert outcome.quantized > 0
