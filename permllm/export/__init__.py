"""Pruned models as checkpoints. Importing this package lets transformers load gathered ones."""

from permllm.export.gathered import register

register()
