"""``tqexport inspect ARTIFACT``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import UsageError

from .common import Output

if TYPE_CHECKING:
    from rich.table import Table

    from tqexport.artifacts.truncate import OpenArtifact
    from tqexport.backends.base import TensorInfo


def inspect_artifact(output: Output, path: Path, options: ReadOptions) -> None:
    """Show what an exported file says of itself."""
    if options.given():
        raise UsageError(f"{path} is an exported file, which says for itself what it is; leave out how to read one")
    with output.step(f"Reading {path}"):
        from tqexport.artifacts.truncate import open_artifact

        artifact = open_artifact(path)
        inputs, outputs = artifact.backend.describe(artifact.content)
        codes = artifact.backend.codes(artifact.content, artifact.own or artifact.widths[-1])
    facts = artifact.facts_at(artifact.own or artifact.widths[-1])
    output.say(f"{path}  {artifact.backend.title}, {len(artifact.content):,} bytes, {facts.layout}")
    output.say(_widths_line(artifact))
    output.say(f"from {facts.architecture}, checkpoint sha256 {facts.checkpoint_sha256 or 'unknown'}")
    output.say(f"quantizer {facts.scheme.quantizer}, activations of {_bits(facts.activation_width)}")
    for what, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            output.say(f"{what} {_tensor(tensor)}")
    output.say(_table(codes))
    output.document(
        {
            "artifact": str(path),
            "format": artifact.backend.name,
            "bytes": len(artifact.content),
            "widths": artifact.widths,
            "computes_with": artifact.own,
            "facts": {bits: asdict(artifact.facts_at(bits)) for bits in artifact.widths},
            "inputs": [asdict(tensor) for tensor in inputs],
            "outputs": [asdict(tensor) for tensor in outputs],
            "weights": {name: list(places[0].shape) for name, places in codes.items()},
        }
    )


def _widths_line(artifact: OpenArtifact) -> str:
    """Which widths the file has, and how they are had."""
    if not artifact.holds_several:
        return f"{_bits(artifact.widths[0])} fixed"
    held = ", ".join(map(str, artifact.widths))
    if artifact.own is None:
        return f"{held} bits, chosen as it runs; tqexport truncate cuts a width out"
    return f"{_bits(artifact.own)}, and tables of {held}; tqexport truncate cuts a width out"


def _table(codes: dict[str, list[Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("weight", "stored as", "shape", "codes"):
        table.add_column(column, justify="right" if column == "codes" else "left", no_wrap=True)
    for name, (stored, *_) in codes.items():
        table.add_row(name, str(stored.dtype), "x".join(map(str, stored.shape)), f"{stored.size:,}")
    return table


def _tensor(tensor: TensorInfo) -> str:
    return f"{tensor.name}: {tensor.dtype} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _bits(width: int) -> str:
    return f"{width} bit{'s' * (width != 1)}"
