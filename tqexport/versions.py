"""The versions of what made or compared a file."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

__all__ = ["COMPARING", "versions"]

COMPARING = ("torch", "onnxruntime", "ai-edge-litert", "onnx2tf", "numpy")  # what a comparison depends on


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, tqexport and packages by name; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("tqexport", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
