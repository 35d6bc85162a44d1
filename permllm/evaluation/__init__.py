"""Perplexity and tasks of lm-eval."""
