"""Whole models on a LayerDropStack."""

from layerdrop_fast.models.transformer_lm import TransformerLM

__all__ = ["TransformerLM"]
