"""The name of the integer kernel; light, for the command line."""

from __future__ import annotations

__all__ = ["INTEGER"]

INTEGER = "integer"
