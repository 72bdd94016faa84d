"""Data sets that need no download: scikit-learn's digits, and signals of a stated formula."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

__all__ = ["Data", "digits", "shifted", "waves"]


@dataclass(frozen=True)
class Data:
    """Training and held-out samples: inputs float32 (N, ...), normalised; labels int64 (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int) -> Data:
    """The 1,797 handwritten digits, (N, 1, 8, 8); a quarter is held out, another one for each seed."""
    bundled = load_digits()
    images = (bundled.images / 16).astype(np.float32)[:, None]
    parts = train_test_split(images, bundled.target, test_size=0.25, random_state=seed, stratify=bundled.target)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    mean, std = train_x.mean(), train_x.std()
    return Data((train_x - mean) / std, train_y, (test_x - mean) / std, test_y)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, 1, 8, 8) moved by up to one pixel, which is all the augmentation 8x8 pixels bear."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    rows, columns = (torch.randint(0, 3, (len(images), 1), generator=generator) + torch.arange(8) for _ in range(2))
    sample = torch.arange(len(images))[:, None, None]
    return padded[:, 0][sample, rows[:, :, None], columns[:, None, :]][:, None]


def waves(seed: int, train: int = 1500, test: int = 500, length: int = 64, noise: float = 0.4) -> Data:
    """Four classes of signals, (N, 1, length).

    With p = f t / length + phase, t = 0 … length - 1, f uniform in [2, 6], phase uniform in [0, 1], and the class
    sine, square, sawtooth or triangle: ``sin(2 pi p)``, its sign, ``2 (p mod 1) - 1``, or ``2 |2 (p mod 1) - 1| - 1``;
    plus normal noise of the deviation given.
    """
    random = np.random.default_rng(seed)
    count = train + test
    labels = random.integers(0, 4, count)
    position = random.uniform(2, 6, (count, 1)) * np.arange(length) / length + random.random((count, 1))
    ramp = 2 * (position % 1) - 1
    sine = np.sin(2 * np.pi * position)
    shapes = np.stack([sine, np.sign(sine), ramp, 2 * np.abs(ramp) - 1])
    signals = shapes[labels, np.arange(count)] + random.normal(0, noise, (count, length))
    x, y = torch.from_numpy(signals.astype(np.float32))[:, None], torch.from_numpy(labels)
    return Data(x[:train], y[:train], x[train:], y[train:])
