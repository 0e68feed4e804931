"""Whole runs: the demo, its training loop and the trials behind its settings."""
