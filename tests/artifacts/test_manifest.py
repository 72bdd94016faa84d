"""tqexport.json: what it may say of its artifacts."""

from __future__ import annotations

import json

import pytest

from tqexport.artifacts.manifest import FILE_NAME, read_manifest
from tqexport.errors import InputError


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kind", "nope", "of the kind 'nope', which this tqexport does not have"),
        ("kind", ["onnx"], "is damaged"),
        ("kernel", "nope", "has the kernel 'nope', which onnx does not have"),
        ("kernel", None, "kernel is None, not a text"),
        ("kernel", ["exact"], "is damaged"),
        ("widths", [9], "widths is a list, not a list of 1, 2"),
        ("widths", [], "has no width"),
    ],
)
def test_an_artifact_of_a_back_end_or_kernel_that_does_not_exist_is_refused(exported, key, value, words):
    path = exported / "out" / FILE_NAME
    content = json.loads(path.read_text())
    content["artifacts"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        read_manifest(exported / "out")
