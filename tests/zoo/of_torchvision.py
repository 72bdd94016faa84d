"""Networks as torchvision builds them, as large as they are, with random weights and few classes.

``make published`` installs that package and runs them; nothing is downloaded but it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from entry import Entry

from tqexport import InputInfo

_OPERATORS: list[torch.library.Library] = []  # which PyTorch has as long as they are kept


def build(name: str, **options: Any) -> Any:
    """A network with random weights; ``segmentation.`` and ``video.`` are modules of torchvision's."""
    module, _, factory = name.rpartition(".")
    return getattr(getattr(models(), module) if module else models(), factory)(**options)


def models() -> Any:
    """torchvision's models, also where its own operators are built for another PyTorch: no network here uses them."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(library)
        import torchvision
    return torchvision.models


def picture(name: str, size: int = 64, **options: Any) -> Entry:
    return Entry(name, partial(build, name, num_classes=10, **options), (InputInfo("input", (3, size, size)),))


WHOLE = {"aux_logits": False, "init_weights": True}  # without the outputs that only training has
SEGMENTS = {"weights": None, "weights_backbone": None}
ENTRIES = [
    picture("resnet18"),
    picture("resnet50"),
    picture("mobilenet_v2"),
    picture("mobilenet_v3_small"),
    picture("mobilenet_v3_large"),
    picture("efficientnet_b0"),
    picture("convnext_tiny"),
    picture("regnet_y_400mf"),
    picture("densenet121"),
    picture("shufflenet_v2_x1_0"),
    picture("squeezenet1_1"),
    picture("mnasnet0_5"),
    picture("googlenet", **WHOLE),
    picture("inception_v3", 96, **WHOLE),
    picture("swin_t"),
    picture("segmentation.lraspp_mobilenet_v3_large", **SEGMENTS),
    picture("segmentation.deeplabv3_mobilenet_v3_large", **SEGMENTS),
]
