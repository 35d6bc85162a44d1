"""The pruned model as a checkpoint. Importing it lets transformers load gathered and packed ones."""

from permllm.export.transformers_classes import register

register()
