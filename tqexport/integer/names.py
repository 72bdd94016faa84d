"""Names of the integer kernel and its forms; light, for the command line."""

from __future__ import annotations

__all__ = ["FLOAT_IO", "FOLDED", "INTEGER", "PACKED", "SYMMETRIC", "is_integer"]

INTEGER = "integer"
FOLDED = "integer-folded"  # ONNX: int8 weights in the place of codes and shift
SYMMETRIC = "integer-symmetric"  # ONNX: the same, int8 values without zero points
FLOAT_IO = "integer-float-io"  # TFLite: float32 in and out
PACKED = "integer-packed"  # weights of few bits; in TFLite bit streams, which TFLite Micro alone unpacks


def is_integer(kernel: str | None) -> bool:
    """Whether a kernel is the integer one, in whatever form."""
    return kernel in (INTEGER, FOLDED, SYMMETRIC, FLOAT_IO, PACKED)
