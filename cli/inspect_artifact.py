"""``tqexport inspect ARTIFACT``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqexport.checkpoints.options import ReadOptions
from tqexport.errors import UsageError

from .common import Output, plural_bits

if TYPE_CHECKING:
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
        batch = artifact.backend.batch(artifact.content)
    facts = artifact.facts_at(artifact.own or artifact.widths[-1])
    at_once = (
        f", {batch} sample{'s' * (batch != 1)} at once" if batch not in (None, artifact.backend.ordinary_batch) else ""
    )
    output.say(f"{path}  {artifact.backend.title}, {len(artifact.content):,} bytes, {facts.layout}{at_once}")
    output.say(_widths_line(artifact))
    output.say(f"from {facts.architecture}, checkpoint sha256 {facts.checkpoint_sha256 or 'unknown'}")
    output.say(f"quantizer {facts.scheme.quantizer}, activations of {plural_bits(facts.activation_width)}")
    output.say(*(f"input {_tensor(tensor)}" for tensor in inputs), *(f"output {_tensor(tensor)}" for tensor in outputs))
    rows = [
        (name, str(stored.dtype), "x".join(map(str, stored.shape)), f"{stored.size:,}")
        for name, (stored, *_) in codes.items()
    ]
    if rows:
        output.table(("weight", "stored as", "shape", "codes"), rows, left=("weight", "stored as", "shape"))
    else:
        output.say(f"kernel {facts.kernel}: int8 weights in the place of codes")
    if packing := artifact.backend.packing.get(facts.kernel or ""):
        output.say(f"kernel {facts.kernel}: {packing}")
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
    """Which widths the file has, and how to get at them."""
    if not artifact.holds_several:
        return f"{plural_bits(artifact.widths[0])} fixed"
    widths = ", ".join(map(str, artifact.widths))
    if artifact.own is None:
        cutting = "; tqexport truncate cuts a width out" if artifact.backend.cuts else ""
        return f"{widths} bits, chosen as it runs{cutting}"
    return f"{plural_bits(artifact.own)}, and tables of {widths}; tqexport truncate cuts a width out"


def _tensor(tensor: TensorInfo) -> str:
    """A tensor in words: ``input: float32 batchx3x32x32``."""
    return f"{tensor.name}: {tensor.dtype} {'x'.join(map(str, tensor.shape)) or 'scalar'}"
