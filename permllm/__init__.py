"""PermLLM: learnable channel permutation for N:M sparse large language models (arXiv 2510.10136).

`permllm.prune` prunes a model in memory, `permllm.perplexity` measures it, `permllm.save` writes a
checkpoint, `permllm.load` loads it, `permllm.keep_zeros` lets fine-tuning keep its zeros, and
`permllm.results` reads runs. After `import permllm.export` transformers can load gathered
checkpoints. `import permllm` alone takes no time.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from permllm.runtime.version import __version__

if TYPE_CHECKING:
    from permllm.api import Pruned, load, perplexity, prune, results, save
    from permllm.export.keep_zeros import keep_zeros

__all__ = [
    "Pruned",
    "__version__",
    "keep_zeros",
    "load",
    "perplexity",
    "prune",
    "results",
    "save",
]

# transformers imports torchao where it is installed. Beside a torch for CPUs it warns that its
# kernels for GPUs are missing.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import a name of the API on demand, because torch and transformers take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from permllm import api

    return getattr(api, name)
