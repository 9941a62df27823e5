"""Distributed training of mixture-of-experts language models on any mesh."""

__version__ = "0.1.0"
