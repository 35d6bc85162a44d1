"""Learnable channel permutation (PermLLM, section 4)."""
