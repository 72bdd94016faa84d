"""Networks as timm builds them, as large as they are, with random weights and few classes.

``make published`` installs that package and runs them; nothing is downloaded but it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import of_torchvision
from entry import EXACT, Entry

from tqexport import InputInfo


def build(name: str, **options: Any) -> Any:
    """A network with random weights."""
    of_torchvision.models()  # which timm imports
    import timm

    return timm.create_model(name, num_classes=10, **options)


def picture(name: str, tflite: str = EXACT, **options: Any) -> Entry:
    return Entry(name, partial(build, name, **options), (InputInfo("input", (3, 64, 64)),), tflite=tflite)


ENTRIES = [
    picture("vit_tiny_patch16_224", img_size=64),
    picture("deit_tiny_patch16_224", img_size=64),
    picture("mobilenetv4_conv_small"),
    picture("efficientvit_b0"),
    picture("repvgg_a0"),
    picture("ghostnet_100"),
    picture("tf_efficientnet_lite0"),
    picture("lcnet_050"),
    picture("tinynet_e"),
    picture("hardcorenas_a"),
    picture("hrnet_w18_small"),
    picture("dla34"),
    picture("mixer_s32_224", img_size=64),
    picture("xcit_nano_12_p16_224", img_size=64),
    picture("edgenext_xx_small"),
    picture("fastvit_t8"),
    picture("mobilevit_xxs"),
    picture("mobilevitv2_050"),
    picture("poolformer_s12"),
    picture("inception_next_atto"),
    picture("nf_resnet26", tflite="computes another weight from its own"),
]
