"""Samples to verify on: arrays, and folders of pictures."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import write_pictures
from places import DIGITS_DATA

from tqexport.errors import InputError
from tqexport.verification.samples import load_samples


def test_a_folder_of_pictures_is_as_good_as_an_array(digits, tmp_path):
    found = load_samples(write_pictures(tmp_path / "pictures"), digits)
    given = load_samples(DIGITS_DATA, digits)
    assert found.inputs[0].shape == (40, 1, 8, 8)
    assert found.description == "on the 40 pictures of pictures"
    order = sorted(range(40), key=lambda i: (given.labels[i], i))
    assert np.array_equal(found.labels, given.labels[order])
    assert np.abs(found.inputs[0] - given.inputs[0][order]).max() < 0.01  # pixels of 8 bits
    scaled = load_samples(write_pictures(tmp_path / "large", size=5, mode="RGB"), digits)
    assert scaled.inputs[0].shape == (40, 1, 8, 8)
    assert np.corrcoef(scaled.inputs[0].ravel(), found.inputs[0].ravel())[0, 1] > 0.95


REFUSED = {
    "no pictures": (lambda folder: folder.mkdir(), "holds no pictures; put those of each class"),
    "an unknown class": (
        lambda folder: write_pictures(folder, 3, lambda label: f"digit{label}"),
        "is named after no class",
    ),
    "no picture": (
        lambda folder: (
            (write_pictures(folder, 3) / "3" / "0.png").parent.mkdir(exist_ok=True)
            or (folder / "3" / "0.png").write_bytes(b"no")
        ),
        "0.png is not a readable picture",
    ),
    "a class out of range": (lambda folder: write_pictures(folder, 3, lambda _: "17"), "is named after no class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_folders_are_refused_with_what_to_do(digits, tmp_path, case):
    prepare, message = REFUSED[case]
    prepare(tmp_path / "pictures")
    with pytest.raises(InputError, match=message):
        load_samples(tmp_path / "pictures", digits)


def test_complex_samples_are_refused(digits, tmp_path):
    np.savez(tmp_path / "samples.npz", inputs=np.ones((4, *digits.info.input_shape), np.complex64))
    with pytest.raises(InputError, match="inputs are of the type complex64"):
        load_samples(tmp_path / "samples.npz", digits)
