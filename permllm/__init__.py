"""PermLLM: learnable channel permutation for N:M sparse large language models (arXiv 2510.10136)."""

__version__ = "0.1.0"
