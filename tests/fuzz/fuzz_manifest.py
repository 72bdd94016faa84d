"""Manifests: damaged JSON, and JSON with odd values."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from harness import ROOT, Reader
from mutators import mutated_bytes, mutated_value

from tqexport import ReadOptions
from tqexport.artifacts.project import open_project

__all__ = ["READER"]

_FOLDER = ROOT / "tests/data/v0.1"


class _Manifest(Reader):
    name = "manifest"

    @cached_property
    def content(self) -> dict[str, Any]:
        """The right manifest."""
        content: dict[str, Any] = json.loads((_FOLDER / "tqexport.json").read_text())
        return content

    def write(self, folder: Path, random: Random) -> Path:
        for entry in self.content["artifacts"]:
            shutil.copy(_FOLDER / entry["file"], folder)
        path = folder / "tqexport.json"
        if random.random() < 0.4:
            path.write_bytes(mutated_bytes((_FOLDER / "tqexport.json").read_bytes(), random))
        else:
            changed = self.content
            for _ in range(random.choice((1, 1, 2, 4))):
                changed = mutated_value(changed, random)
            path.write_text(json.dumps(changed), encoding="utf-8")
        return folder

    def read(self, path: Path) -> None:
        project = open_project(path, None, ReadOptions())
        for kind in ("onnx", "tflite"):
            project.find(kind, 4)
        list(project.artifacts(project.exported_widths()))
        assert project.manifest is not None  # of the folder that was named
        project.manifest.with_artifacts(project.manifest.artifacts).write(path)
        str((project.name, project.quantizer, project.widths, project.default_kernel))


READER = _Manifest()
