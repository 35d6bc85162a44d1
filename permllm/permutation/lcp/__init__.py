"""Learnable channel permutation (PermLLM): its settings, logits, Sinkhorn normalisation, masked linears, training."""
