"""The folder of a page: the network's ONNX files, what is known of them, samples, the page and onnxruntime-web.

``facts.json`` says all that the page has to know, so that ``assets/`` is the same for every network. It also lists the
files of the folder: a folder that holds others is never replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tqexport.artifacts.project import Project
from tqexport.backends import BACKENDS
from tqexport.backends.base import TensorInfo
from tqexport.backends.onnx.web_package import GLUE, MODULE, WASM, WebPackage
from tqexport.errors import ConversionError, InputError, UsageError
from tqexport.facts import MultiWidthFacts
from tqexport.files import write_folder
from tqexport.verification.pictures import takes_pictures
from tqexport.verification.samples import Samples
from tqexport.versions import versions

__all__ = ["FACTS", "Page", "build_page", "check_page", "write_page"]

FACTS = "facts.json"
_SCHEMA = 1
_FORMAT = "onnx"
_SAMPLES, _SAMPLE_BYTES = 200, 16 << 20  # of samples where nobody says how many
_RUNTIME = "onnxruntime-web"  # the folder of its files, which end in .js: not every server knows .mjs
_RUNTIME_FILES = {MODULE: "ort.wasm.min.js", GLUE: "ort-wasm-simd-threaded.js", WASM: WASM}


@dataclass(frozen=True)
class Page:
    """A page that was built.

    Attributes:
        files: Content by path in its folder.
        facts: What ``facts.json`` says.
    """

    files: Mapping[str, bytes]
    facts: Mapping[str, Any]


def check_page(folder: Path, project: Project, *, sampled: bool) -> None:
    """Refuse what no page can be made of, before any slow work.

    Args:
        folder: Where the page is to be written.
        project: The network.
        sampled: Whether there are samples.

    Raises:
        UsageError: The folder holds something else than an earlier page, or nothing could be put in.
    """
    _check_folder(folder)
    signature = project.model.info.signature
    if not sampled and not takes_pictures(signature):
        takes = ", ".join(f"{info.dtype} {info.shape}" for info in signature)
        raise UsageError(
            f"the network takes {takes}, which nobody can draw; give samples for the page to choose from with --data"
        )


def build_page(project: Project, samples: Samples | None, package: WebPackage, most: int | None = None) -> Page:
    """Export the network and put everything together; nothing is written.

    Args:
        project: The network.
        samples: Samples before normalisation.
        package: onnxruntime-web.
        most: How many samples the page gets; None is 200, fewer where these are large.

    Raises:
        InputError: The network gives no classes.
        ConversionError: It cannot be exported to ONNX.
    """
    exports, sizes = _exports(project)
    chosen = None if samples is None else _spread(samples, most or _fitting(samples))
    parts = {name: content for name, (content, _) in exports.items()}
    parts |= {f"{_RUNTIME}/{ours}": package.files[name] for name, ours in _RUNTIME_FILES.items()}
    assets = resources.files("tqexport.page") / "assets"
    parts |= {asset.name: asset.read_bytes() for asset in assets.iterdir() if asset.is_file()}
    info = project.model.info
    inputs = {f"samples-{each.name}.bin": each for each in info.signature}
    if chosen is not None:
        for name, values in zip(inputs, chosen.inputs, strict=True):
            parts[name] = values.astype(values.dtype.newbyteorder("<")).tobytes()
    facts = {
        "schema_version": _SCHEMA,
        "name": project.name,
        "architecture": info.architecture,
        "checkpoint_sha256": project.model.sha256,
        "kernel": project.default_kernel,
        "quantizer": info.scheme.quantizer,
        "inputs": [asdict(each) for each in info.signature],
        "output": _classes(project, next(iter(parts.values()))),
        "picture": takes_pictures(info.signature),
        "normalization": None if info.normalization is None else asdict(info.normalization),
        "class_names": list(info.class_names),
        "widths": list(sizes),
        "models": [
            {"file": name, "widths": widths, "switched": len(widths) > 1, "bytes": len(content)}
            for name, (content, widths) in exports.items()
        ],
        "bytes": sizes,
        "samples": None if chosen is None else _described(chosen, list(inputs)),
        "runtime": {"name": "onnxruntime-web", "version": package.version, "folder": _RUNTIME},
        "versions": versions(BACKENDS[_FORMAT].packages),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(parts.items())},
    }
    parts[FACTS] = json.dumps(facts, indent=1).encode()
    return Page(parts, facts)


def write_page(folder: Path, page: Page) -> None:
    """Write a page whole or not at all, in the place of an earlier one.

    Raises:
        UsageError: The folder holds something else.
        HostError: It cannot be written.
    """
    _check_folder(folder)
    write_folder(folder, page.files)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is no earlier page."""
    try:
        held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror or error}") from error
    if not held:
        return
    try:
        ours = {FACTS, *json.loads((folder / FACTS).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        ours = set()
    if others := sorted(held - ours):
        raise UsageError(f"{folder} holds {others[0]}, which is no part of a page; name another folder with --output")


def _exports(project: Project) -> tuple[dict[str, tuple[bytes, list[int]]], dict[int, dict[str, int | None]]]:
    """The files that run every width, with their widths, and the sizes of the fixed files of each width.

    One run-time file has all that it can hold; a width that it lacks, and each of a network whose codes cannot be
    shifted, has a fixed file.
    """
    backend, kernel = BACKENDS[_FORMAT], project.default_kernel
    fixed = dict(project.make(_FORMAT, project.widths, kernel))
    files: dict[str, tuple[bytes, list[int]]] = {}
    if len(fixed) > 1 and project.quantizer != "dorefa":
        with project.step("Exporting every width in one file"):
            content = backend.export_runtime(project, kernel)
        facts = backend.facts(content)
        widths = list(facts.widths if isinstance(facts, MultiWidthFacts) else ())
        files[project.file_name(_FORMAT, widths, kernel)] = content, widths
    held = {bits for _, widths in files.values() for bits in widths}
    for bits, content in fixed.items():
        if bits not in held:
            files[project.file_name(_FORMAT, [bits], kernel)] = content, [bits]
    return files, {bits: {"fixed": len(content), "packed": _packed(content, bits)} for bits, content in fixed.items()}


def _packed(fixed: bytes, bits: int) -> int | None:
    """Size of the packed file of a width, if it is smaller."""
    backend = BACKENDS[_FORMAT]
    try:
        return len(backend.pack(fixed)) if bits in backend.packed_widths else None
    except ConversionError:
        return None


def _classes(project: Project, content: bytes) -> dict[str, Any]:
    """The output whose largest number is the class.

    Raises:
        InputError: There is none.
    """
    first: TensorInfo = BACKENDS[_FORMAT].describe(content)[1][0]
    if len(first.shape) != 2 or not isinstance(first.shape[1], int) or not first.dtype.startswith("float"):
        raise InputError(
            f"{project.checkpoint}: the page shows classes, and the output {first.name} is {first.dtype} "
            f"{'x'.join(map(str, first.shape))}; it takes networks with a number for each class"
        )
    names = project.model.info.class_names
    if names and len(names) != first.shape[1]:
        raise InputError(f"{project.checkpoint} has {len(names)} class names for {first.shape[1]} classes")
    return {"name": first.name, "classes": first.shape[1]}


def _fitting(samples: Samples) -> int:
    """How many samples a page gets where nobody says it."""
    size = sum(values[:1].nbytes for values in samples.inputs)
    return max(1, min(_SAMPLES, _SAMPLE_BYTES // max(size, 1)))


def _spread(samples: Samples, most: int) -> Samples:
    """At most so many samples, from all over the file, which may be in the order of the classes."""
    if len(samples) <= most:
        return samples
    rows = np.arange(most) * len(samples) // most
    labels = None if samples.labels is None else samples.labels[rows]
    return replace(samples, inputs=tuple(values[rows] for values in samples.inputs), labels=labels)


def _described(samples: Samples, files: Sequence[str]) -> dict[str, Any]:
    return {
        "count": len(samples),
        "files": list(files),
        "labels": None if samples.labels is None else samples.labels.tolist(),
        "description": samples.description,
        "sha256": samples.sha256,
    }
