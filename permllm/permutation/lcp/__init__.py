"""Learnable channel permutation (PermLLM): its logits, Sinkhorn normalisation, masked linears, training."""
