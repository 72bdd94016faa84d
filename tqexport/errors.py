"""The errors tqexport raises, each with the exit code the command line gives it."""

from __future__ import annotations

__all__ = [
    "ConversionError",
    "HostError",
    "InputError",
    "TqExportError",
    "UsageError",
]


class TqExportError(Exception):
    """Base of every error that tqexport raises on purpose.

    The message is one sentence that a user can act on: which file or layer, what is wrong, what to do.
    """

    exit_code = 3


class UsageError(TqExportError):
    """The request itself makes no sense (exit code 2)."""

    exit_code = 2


class InputError(TqExportError):
    """A file or network is corrupt, unsafe, unsupported, or lacks the width asked for (exit code 3)."""


class ConversionError(InputError):
    """A converter could not carry the network over; the message names the layer or step (exit code 3)."""


class HostError(TqExportError):
    """Something this machine lacks: a package, a writable folder, space on the disk (exit code 4)."""

    exit_code = 4
