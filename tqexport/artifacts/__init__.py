"""Exported files and the folder they lie in."""
