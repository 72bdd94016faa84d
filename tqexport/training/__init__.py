"""Truncation-ready layers, and training them."""
