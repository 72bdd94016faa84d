"""Rows of a weight that a file has by themselves."""

from __future__ import annotations

import numpy as np

from tqexport.backends.coded_weight import CodedWeight, joined

CODES = np.arange(24, dtype=np.uint8).reshape(6, 4)
WEIGHT = CodedWeight("layer.weight", CODES, 4, 0.5, -1.0, 4)


def test_rows_are_joined_in_their_order_at_every_place():
    parts = [WEIGHT.rows(*ends) for ends in ((4, 6), (0, 4))]
    assert [part.name for part in parts] == ["layer.weight[4:6]", "layer.weight[0:4]"]
    assert np.array_equal(np.concatenate([part.dequantized() for part in parts[::-1]]), WEIGHT.dequantized())
    codes = {part.name: [part.codes, part.codes + 1] for part in parts}
    whole = joined({**codes, "other": [CODES]})
    assert [*whole] == ["other", "layer.weight"]
    assert np.array_equal(whole["layer.weight"], [CODES, CODES + 1])


def test_rows_that_do_not_go_together_are_left_as_they_are():
    first, second = ([WEIGHT.rows(*ends).codes] for ends in ((0, 4), (4, 6)))
    for codes in (
        {"w[0:4]": first, "w[4:6]": [second[0][:, :2]]},
        {"w[0:4]": first, "w[4:6]": [second[0].astype(np.int8)]},
        {"w[0:4]": first, "w[4:6]": second * 2},
        {"w[0:4]": first, "w": [CODES]},
    ):
        assert joined(codes) == codes
