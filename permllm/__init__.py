"""PermLLM: learnable channel permutation for N:M sparse large language models (arXiv 2510.10136).

Importing it lets transformers load gathered and packed checkpoints (`permllm.export`).
"""

from permllm.export.transformers_classes import register

__version__ = "0.1.0"

register()
