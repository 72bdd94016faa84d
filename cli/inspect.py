"""``tqexport inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tqexport.backends import BACKENDS
from tqexport.checkpoints.options import ReadOptions

from .common import Output, checkpoint_options, output_options

__all__ = ["command", "inputs_line"]

if TYPE_CHECKING:
    from tqexport.analysis.inspection import Inspection
    from tqexport.model import CheckpointInfo, InputInfo


@click.command("inspect")
@click.argument("checkpoint", metavar="CHECKPOINT | ARTIFACT", type=click.Path(path_type=Path))
@checkpoint_options
@output_options
def command(checkpoint: Path, options: ReadOptions, output: Output) -> None:
    """Show what CHECKPOINT holds, what it costs, and whether it can be truncated.

    Of an ARTIFACT, an exported file, it shows what the file says of itself.
    """
    if checkpoint.suffix[1:] in BACKENDS:
        from .inspect_artifact import inspect_artifact

        inspect_artifact(output, checkpoint, options)
        return
    with output.step(f"Reading {checkpoint}"):
        from tqexport.analysis.inspection import inspect_model
        from tqexport.checkpoints.checkpoint import load_checkpoint

        model = load_checkpoint(checkpoint, options)
        inspection = inspect_model(model)
    output.say(*_description(model.info, model.assumed))
    _say_layers(output, inspection)
    if inspection.ranges:
        _say_ranges(output, inspection)
    _say_widths(output, inspection)
    output.say(_storage_line(inspection), _truncation_line(inspection, model.info))
    output.document(
        {
            "checkpoint": str(checkpoint),
            "sha256": model.sha256,
            **asdict(model.info),
            "inputs": [asdict(info) for info in model.info.signature],
            "assumed": model.assumed,
            **asdict(inspection),
            "truncatable": inspection.truncatable,
        }
    )


def _description(info: CheckpointInfo, assumed: tuple[str, ...]) -> list[str]:
    """How the network was built and trained, a line for each topic."""
    arguments = ", ".join(f"{key}={value}" for key, value in info.arguments.items())
    activations = ", ".join(f"{bits}: {info.activation_width(bits)}" for bits in info.widths)
    lines = [
        f"{info.architecture}({arguments}), {inputs_line(info)}",
        f"quantizer {info.scheme.quantizer}{', bias correction' if info.scheme.bias_correction else ''}"
        f"{', E rounded to a power of two' if info.scheme.power_of_two_scale else ''}; "
        f"BatchNorm chosen by {info.batch_norm_key} width",
        f"widths {', '.join(map(str, info.widths))}; activation width of each: "
        + ("the same" if not info.activation_bits else activations),
    ]
    if assumed:
        lines.append(f"assumed, because the file does not say it: {', '.join(assumed)}")
    return lines


def inputs_line(info: CheckpointInfo) -> str:
    """What the network takes, one sample each."""
    takes = [f"{each.name} {'x'.join(_sizes(each)) or 'one number'} {each.dtype}" for each in info.signature]
    return f"input{'s' if len(takes) > 1 else ''} {', '.join(takes)}"


def _sizes(info: InputInfo) -> list[str]:
    """Sizes of a sample, with the names of those that are dynamic."""
    names = info.dynamic_axes
    return [f"{names[axis]}={size}" if axis in names else str(size) for axis, size in enumerate(info.shape)]


def _say_layers(output: Output, inspection: Inspection) -> None:
    """Print what is known of each weight."""
    rows = [
        (
            *(layer.name, layer.kind, "x".join(map(str, layer.shape))),
            *("8-bit codes" if layer.quantized else "float32", f"{layer.weights:,}", f"{layer.magnitude:.4f}"),
        )
        for layer in inspection.layers
    ]
    columns = ("layer", "kind", "shape", "stored as", "weights", "E")
    output.table(columns, rows, left=columns[:4])


def _say_ranges(output: Output, inspection: Inspection) -> None:
    """Print what is known of each activation whose range was learned."""
    rows = [(each.name, f"{-each.range if each.signed else 0:.4g}", f"{each.range:.4g}") for each in inspection.ranges]
    output.table(("activation", "from", "to"), rows)


def _say_widths(output: Output, inspection: Inspection) -> None:
    """Print what the network costs at each width, and how many codes shifting would change."""
    rows = [
        (
            *(str(bits), f"{size:,}", f"{100 * size / inspection.storage.float32:.1f} %"),
            f"{100 * inspection.changed[bits]:.2f} %",
        )
        for bits, size in inspection.storage.packed.items()
    ]
    output.table(("bits", "packed bytes", "of float32", "codes changed by shifting"), rows)


def _storage_line(inspection: Inspection) -> str:
    storage = inspection.storage
    return (
        f"parameters: {storage.float32:,} bytes in float32; {storage.codes:,} with 8-bit codes "
        f"({storage.float32 / storage.codes:.2f}x smaller); {storage.every_width:,} for every width in one"
    )


def _truncation_line(inspection: Inspection, info: CheckpointInfo) -> str:
    """Whether the codes can be shifted to lower widths."""
    if inspection.truncatable:
        return "The codes can be truncated: shifting them gives exactly the weights trained at every width."
    changed = inspection.changed
    worst = max(changed, key=lambda bits: changed[bits])
    return (
        f"The codes must not be truncated: {info.scheme.quantizer} rounds, and shifting would change "
        f"{100 * changed[worst]:.1f} % of them at {worst} bits. Each width is exported from the float weights."
    )
