"""The same N:M for all linears that the settings do not name."""

from permllm.allocation.base import Allocation


class Uniform(Allocation):
    """Allocation of the settings: `sparsity`, but for `keep_dense` and `sparsity_of`."""
