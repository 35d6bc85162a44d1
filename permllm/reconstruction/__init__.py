"""The updates of kept weights, by the names that settings call them; each is imported when it is asked for."""

from permllm.lazy import imported_when_asked

__getattr__ = imported_when_asked(
    __name__,
    {
        "ADMM": "permllm.reconstruction.admm",
        "OBS": "permllm.reconstruction.obs",
        "Distill": "permllm.reconstruction.distill",
        "NoReconstruction": "permllm.reconstruction.base",
    },
)
