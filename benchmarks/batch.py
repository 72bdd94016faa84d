"""Files that take several samples at once against files that take one: the time of a sample in LiteRT.

python benchmarks/batch.py                the bundled ResNet-8, with float kernels and with integers
python benchmarks/batch.py --batch 32     another batch
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import click
import onnx

from tqexport import load_checkpoint
from tqexport.backends.base import EXACT
from tqexport.backends.onnx.export import export_onnx
from tqexport.backends.running import median_seconds
from tqexport.backends.tflite.convert import convert_to_tflite
from tqexport.backends.tflite.integer_form import integer_tflite
from tqexport.backends.tflite.session import LiteRTSession
from tqexport.integer.names import INTEGER

FIXTURES = Path(__file__).parents[1] / "fixtures"
BITS = 4


@click.command(help=__doc__)
@click.option("--batch", type=click.IntRange(2), default=8, show_default=True, help="Samples at once.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Measurements of each, in turns.")
def main(batch: int, rounds: int) -> None:
    for kernel, (one, several) in {EXACT: floats(batch), INTEGER: integers(batch)}.items():
        sessions = LiteRTSession(one), LiteRTSession(several)
        ratios, seconds = [], []
        for _ in range(rounds):
            alone, together = (median_seconds(session.run_zeros) for session in sessions)
            ratios.append(together / batch / alone)
            seconds.append((alone, together / batch))
        alone, together = (statistics.median(column) * 1e6 for column in zip(*seconds, strict=True))
        sys.stdout.write(
            f"{kernel}: {alone:.1f} us a sample alone, {together:.1f} us in a batch of {batch}, ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n"
        )


def floats(batch: int) -> list[bytes]:
    """Exact files for one sample and for a batch."""
    model = load_checkpoint(FIXTURES / "digits-resnet8.pt")
    models = [onnx.load_from_string(content) for _, content in export_onnx(model, (BITS,))]
    return [convert_to_tflite(models, batch=size)[0] for size in (1, batch)]


def integers(batch: int) -> list[bytes]:
    """Files of integers for one sample and for a batch."""
    model = load_checkpoint(FIXTURES / "digits-resnet8-int.pt")
    return [integer_tflite(model, BITS, batch=size) for size in (1, batch)]


if __name__ == "__main__":
    main()
