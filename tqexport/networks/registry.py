"""Architectures by name. A factory takes plain keyword arguments and returns a prepared network."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from tqexport.errors import UsageError
from tqexport.networks.research_models import RESEARCH_ARCHITECTURES
from tqexport.networks.tiny_models import TINY_ARCHITECTURES

__all__ = ["ARCHITECTURES", "Factory", "find_factory"]

Factory = Callable[..., nn.Module]


ARCHITECTURES: dict[str, Factory] = {**TINY_ARCHITECTURES, **RESEARCH_ARCHITECTURES}


def find_factory(architecture: str) -> Factory:
    """The factory of a registered name, or of ``package.module:factory``.

    A dotted factory is imported with the working folder on the path, which runs code: the name must come from the user,
    never from a file. It must return a prepared network.

    Raises:
        UsageError: The name is not registered, or the module or factory cannot be imported.
    """
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    module_name, colon, attribute = architecture.partition(":")
    if not colon:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UsageError(
            f"unknown architecture {architecture!r}; known are {known}. "
            "Bring your own with --model package.module:factory"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the network factory {architecture!r}: {error}") from error
    if not callable(factory):
        raise UsageError(f"{architecture!r} is not callable; name a function that returns the prepared network")
    return cast(Factory, factory)
