"""Datasets; importing this package registers them."""

from src.data import angio  # noqa: F401
