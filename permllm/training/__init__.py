"""Gradient descent: trainer, objective, losses and kernels."""
