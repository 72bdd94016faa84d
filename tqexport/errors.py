"""The errors tqexport raises, each with the exit code the command line gives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "ConversionError",
    "HostError",
    "InputError",
    "TqExportError",
    "UsageError",
    "about",
    "first_line",
    "printable",
    "said_in_a_line",
]


class TqExportError(Exception):
    """Base of every error that tqexport raises on purpose.

    The message is one sentence that a user can act on: which file or layer, what is wrong, what to do. It stays one
    line that a terminal can print, whatever a name in a file holds.
    """

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.splitlines())))


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


def printable(text: str) -> str:
    """A text without control characters but line ends: names in files may hold what a terminal would obey."""
    return "".join(part if part.isprintable() or part == "\n" else "\N{REPLACEMENT CHARACTER}" for part in text)


def first_line(error: BaseException) -> str:
    """First line of what a library says, which may go on with pages of where it was; its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def said_in_a_line(error: BaseException) -> str:
    """Class and first line of what a library says."""
    name, said = type(error).__name__, first_line(error)
    return said if said == name else f"{name}: {said}"


@contextmanager
def about(subject: str, error_class: type[InputError] = InputError) -> Iterator[None]:
    """Within the block, the message of an :class:`InputError` gets in front of it what it is about.

    Args:
        subject: What goes in front, e.g. ``net.onnx`` or ``layer conv1:``.
        error_class: The class of the error that is raised.

    Example:
        >>> with about("layer conv1:"):
        ...     raise InputError("all weights are zero")
        Traceback (most recent call last):
        tqexport.errors.InputError: layer conv1: all weights are zero
    """
    try:
        yield
    except InputError as error:
        raise error_class(f"{subject} {error}") from error
