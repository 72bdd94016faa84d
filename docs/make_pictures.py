"""Draw the pictures of the pages: python docs/make_pictures.py writes docs/pictures/."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).with_name("pictures")
BITS = 2


def draw_shift() -> None:
    """Codes of 2 bits over what is quantised: by themselves, and shifted from codes of 8 bits."""
    x = np.linspace(0, 1, 4001)
    most, stored = 2**BITS - 1, 255
    quantizers = {
        "TruncQuant, floor": lambda steps: np.minimum(np.floor((steps + 1) * x), steps),
        "DoReFa, rounding": lambda steps: np.round(steps * x),
    }
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for axis, (name, codes) in zip(axes, quantizers.items(), strict=True):
        own, shifted = codes(most), codes(stored).astype(int) >> (8 - BITS)
        axis.fill_between(x, own, shifted, step="mid", color="tab:red", alpha=0.4, label="differ")
        axis.plot(x, own, color="tab:blue", label=f"quantised to {BITS} bits")
        axis.plot(x, shifted, color="black", linestyle="--", label=f"8-bit code >> {8 - BITS}")
        changed = np.mean(own != shifted)
        axis.set(
            title=f"{name}: {100 * changed:.0f} % differ", xlabel="weight, scaled to [0, 1]", yticks=range(most + 1)
        )
    axes[0].set_ylabel("code")
    axes[0].legend(loc="upper left", fontsize="small")
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / "shift.png", dpi=120)


if __name__ == "__main__":
    draw_shift()
