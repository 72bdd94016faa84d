"""Architectures by name, and the networks behind them."""
