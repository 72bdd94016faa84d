"""Checkpoints as the research code writes them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["training_file"]


def training_file(module: nn.Module, name: str = "resnet20q", prefix: str = "module.") -> dict[str, Any]:
    """What the training scripts save."""
    state = OrderedDict((prefix + key, value) for key, value in module.state_dict().items())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return {"epoch": 3, "model": name, "state_dict": state, "best_prec1": 87.5, "optimizer": optimizer.state_dict()}
