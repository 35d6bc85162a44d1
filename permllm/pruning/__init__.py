"""The base pruners, by the names that settings call them; each is imported when it is asked for."""

from permllm.lazy import imported_when_asked

__getattr__ = imported_when_asked(
    __name__,
    {
        "RIA": "permllm.pruning.ria",
        "Magnitude": "permllm.pruning.magnitude",
        "SparseGPT": "permllm.pruning.sparsegpt",
        "Wanda": "permllm.pruning.wanda",
    },
)
