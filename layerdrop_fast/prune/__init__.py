"""Cutting a trained network to a smaller depth."""

from layerdrop_fast.prune.every_other import every_other
from layerdrop_fast.prune.extract import extract

__all__ = ["every_other", "extract"]
