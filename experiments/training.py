"""One training loop for every experiment, and the recipes that it follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from experiments.data import Data
from tqexport import Scheme, at_width, joint_backward, set_quantizer
from tqexport.training.quantizers import Estimator

__all__ = ["Recipe", "accuracy", "train"]

BATCH = 64
LEARNING_RATE = 4e-3

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: see ``tqexport.joint_backward`` and ``tqexport.set_quantizer``."""

    scheme: Scheme = field(default_factory=Scheme)
    estimator: Estimator = "identity"
    distillation: float = 0.0
    alignment: float = 0.0


def train(
    network: nn.Module,
    data: Data,
    widths: Sequence[int],
    epochs: int,
    seed: int,
    recipe: Recipe = Recipe(),
    augment: Augmentation | None = None,
    after_epoch: Callable[[], None] | None = None,
) -> nn.Module:
    """Train in place, jointly at ``widths``; AdamW with a one-cycle learning rate. Returns it in evaluation mode."""
    set_quantizer(network, recipe.scheme, recipe.estimator)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    batches = len(data.train_x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(len(data.train_x), generator=generator).split(BATCH)[:batches]:
            inputs = data.train_x[batch]
            optimizer.zero_grad()
            joint_backward(
                network,
                augment(inputs, generator) if augment else inputs,
                data.train_y[batch],
                widths,
                nn.functional.cross_entropy,
                distillation=recipe.distillation,
                alignment=recipe.alignment,
            )
            optimizer.step()
            schedule.step()
        network.eval()
        if after_epoch:
            after_epoch()
    return network


def accuracy(network: nn.Module, data: Data, bits: int) -> float:
    """Share of the held-out samples that a network in evaluation mode classifies right at a width."""
    with torch.no_grad(), at_width(network, bits):
        return float((network(data.test_x).argmax(1) == data.test_y).float().mean())
