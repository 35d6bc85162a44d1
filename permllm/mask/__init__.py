"""The methods that choose masks, by the names that settings call them; each is imported when it is asked for."""

from permllm.lazy import imported_when_asked

__getattr__ = imported_when_asked(
    __name__,
    {
        "PrunerMask": "permllm.mask.pruner",
        "RefinedMask": "permllm.mask.refined",
        "ScoreMask": "permllm.mask.score",
        "LowRankMask": "permllm.mask.lowrank",
    },
)
