"""Pictures from strangers are decoded in this process or refused."""

from __future__ import annotations

import pytest
from PIL import EpsImagePlugin, Image

from tqexport.errors import InputError
from tqexport.model import InputInfo
from tqexport.verification.samples import read_samples


@pytest.mark.parametrize("suffix", ["png", "eps"])
def test_no_program_is_started_on_a_postscript_file(tmp_path, monkeypatch, suffix):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(1))
    folder = tmp_path / "0"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "picture.eps")
    (folder / "picture.eps").rename(folder / f"picture.{suffix}")
    with pytest.raises(InputError, match=f"picture.{suffix} is not a readable picture"):
        read_samples(tmp_path, [InputInfo("input", (1, 8, 8))])
    assert started == []
