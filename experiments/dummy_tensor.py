"""The gap on a dummy tensor: flooring matches the shift, rounding does not.

python -m experiments.dummy_tensor    writes dummy_tensor.json and dummy_tensor.png
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from experiments.results import RESULTS, write_json
from tqexport.truncation import STORED_BITS, WIDTHS, Quantizer, direct_codes, max_code, truncate

COUNT = 4097  # every value k / 4096, which no quantiser here finds special
SHOWN = 2  # bits of the picture
QUANTIZERS: tuple[Quantizer, ...] = ("truncquant", "dorefa")
NAMES = {"truncquant": "floor (TruncQuant)", "dorefa": "round (ordinary)"}


def measure() -> dict[str, list[dict[str, float]]]:
    """By quantiser and width: share of codes that shifting changes, and the largest difference of the value."""
    x = torch.linspace(0, 1, COUNT)
    table = {}
    for quantizer in QUANTIZERS:
        stored = direct_codes(x, STORED_BITS, quantizer).byte()
        rows = []
        for bits in WIDTHS:
            direct, shifted = direct_codes(x, bits, quantizer), truncate(stored, bits)
            rows.append(
                {
                    "bits": bits,
                    "changed": float((shifted != direct).float().mean()),
                    "largest_difference": float((shifted - direct).abs().max() / max_code(bits)),
                }
            )
        table[quantizer] = rows
    return table


def draw(path: Path) -> None:
    """Quantised and truncated staircases at 2 bits, one panel per quantiser."""
    from matplotlib.figure import Figure

    x = torch.linspace(0, 1, COUNT)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, quantizer in zip(figure.subplots(1, 2, sharey=True), QUANTIZERS, strict=True):
        direct = direct_codes(x, SHOWN, quantizer)
        shifted = truncate(direct_codes(x, STORED_BITS, quantizer).byte(), SHOWN)
        axes.fill_between(x, 0, 1, where=(direct != shifted), color="tab:red", alpha=0.15, label="code changed",
                          transform=axes.get_xaxis_transform())  # fmt: skip
        axes.plot(x, x * max_code(SHOWN), ":", color="grey", label="not quantised")
        axes.plot(x, direct, lw=3, label=f"quantised to {SHOWN} bits")
        axes.plot(x, shifted, "--", lw=2, label=f"8-bit codes shifted right by {STORED_BITS - SHOWN}")
        axes.set_title(NAMES[quantizer], fontsize=10)
        axes.set_xlabel("normalised weight")
        axes.set_yticks(range(max_code(SHOWN) + 1))
    figure.axes[0].set_ylabel("code")
    figure.axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=RESULTS, show_default="experiments/results")
def main(folder: Path) -> None:
    """Measure and draw."""
    write_json(folder / "dummy_tensor.json", {"values": f"k / {COUNT - 1}", "table": measure()})
    draw(folder / "dummy_tensor.png")


if __name__ == "__main__":
    main()
