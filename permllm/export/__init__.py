"""The pruned model as a checkpoint. Importing it lets transformers load gathered ones."""

from permllm.export.gathered import register

register()
