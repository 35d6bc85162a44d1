"""Learnable channel permutation (PermLLM): its settings, logits, Sinkhorn normalisation, masked linears, training."""

from permllm.permutation.lcp.method import LCP

__all__ = ["LCP"]
