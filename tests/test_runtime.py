"""An application opens a file, sets the width and runs: the fixed files' answers, from one file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tqexport.backends import run_file
from tqexport.errors import InputError
from tqexport.runtime import SwitchableModel

WIDTHS = range(1, 9)


def test_every_width_of_an_onnx_file_answers_as_its_fixed_file(runtime_files, exported_once, digits_samples):
    x = digits_samples.inputs[:64]
    model = SwitchableModel(runtime_files / "ckpt.onnx")
    assert model.widths == tuple(WIDTHS)
    assert model.bits == 8
    for bits in (8, 1, 4, 8, 2, 3, 5, 6, 7):
        model.bits = bits
        fixed = (exported_once / "out" / f"ckpt-w{bits}.onnx").read_bytes()
        assert np.array_equal(model.run(x), run_file(fixed, x).output)


def test_a_fixed_file_has_its_own_width_only(exported_once, digits_samples):
    path = exported_once / "out" / "ckpt-w4.onnx"
    model = SwitchableModel(str(path))
    assert (model.widths, model.bits) == ((4,), 4)
    assert np.array_equal(model.run(digits_samples.inputs), run_file(path.read_bytes(), digits_samples.inputs).output)
    with pytest.raises(InputError, match="holds 4 bits, so it cannot run at 8"):
        model.bits = 8
    assert model.bits == 4


@pytest.mark.parametrize("bits", [0, 9, 32, None, "4"])
def test_a_width_the_file_lacks_is_refused_and_the_old_one_stays(runtime_files, bits):
    model = SwitchableModel(runtime_files / "ckpt.onnx", 2)
    with pytest.raises(InputError, match="cannot run at"):
        model.bits = bits
    assert model.bits == 2


def test_released_widths_run_again(runtime_files, digits_samples):
    model = SwitchableModel((runtime_files / "ckpt.onnx").read_bytes(), bits=3, threads=2)
    before = model.run(digits_samples.inputs[:3])
    model.release()
    assert np.allclose(model.run(digits_samples.inputs[:3]), before, atol=1e-5)


def test_a_batch_of_another_shape_or_a_damaged_file_is_refused(runtime_files, exported_once, tmp_path):
    with pytest.raises(InputError, match="does not run the batch"):
        SwitchableModel(runtime_files / "ckpt.onnx").run(np.zeros((1, 1, 9, 8), np.float32))
    for content in (b"", b"hello", (runtime_files / "ckpt.onnx").read_bytes()[:5000]):
        with pytest.raises(InputError, match="is not a valid"):
            SwitchableModel(content)
    with pytest.raises(InputError, match="cannot be read"):
        SwitchableModel(tmp_path / "nothing.onnx")
    for key, value, message in (
        ("tqexport.width", "[4]", "was not written by tqexport"),
        ("tqexport.widths", "[4, 99]", "was changed or damaged"),
        ("tqexport.widths", "8", "was changed or damaged"),
    ):
        foreign = onnx.load(exported_once / "out" / "ckpt-w4.onnx")
        onnx.helper.set_model_props(foreign, {key: value})
        with pytest.raises(InputError, match=message):
            SwitchableModel(foreign.SerializeToString())
