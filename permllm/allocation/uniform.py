"""Pruning of all linears that the settings do not keep dense."""

from permllm.allocation.base import Allocation


class Uniform(Allocation):
    """Allocation of the settings: all linears are pruned, except those of `keep_dense`."""
