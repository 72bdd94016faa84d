"""A folder that looks like a copy of onnxruntime-web, for what never runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tqexport.backends.onnx.web_package import GLUE, MODULE, WASM

__all__ = ["web_copy"]


def web_copy(folder: Path) -> Path:
    """Make the folder: the names are those of the package, what is in the files is not."""
    (folder / "dist").mkdir(parents=True)
    for name in (MODULE, GLUE, WASM):
        (folder / "dist" / name).write_text(f"not {name}")
    (folder / "package.json").write_text(json.dumps({"version": "0.1.2"}))
    return folder
