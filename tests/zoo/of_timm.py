"""Networks as timm builds them, as large as they are, with random weights and few classes.

``make published`` installs that package and runs them; nothing is downloaded but it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import of_torchvision
from entry import Entry

from tqexport import InputInfo


def build(name: str, **options: Any) -> Any:
    """A network with random weights."""
    of_torchvision.models()  # which timm imports
    import timm

    return timm.create_model(name, num_classes=10, **options)


def picture(name: str, size: int = 64, **options: Any) -> Entry:
    return Entry(name, partial(build, name, **options), (InputInfo("input", (3, size, size)),))


ENTRIES = [
    picture("vit_tiny_patch16_224", img_size=64),
]
