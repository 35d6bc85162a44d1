"""PermLLM: learnable channel permutation for N:M sparse large language models (arXiv 2510.10136).

`permllm.load(DIR)` opens a checkpoint that an export wrote. `import permllm.export` lets transformers load gathered and packed
ones by itself. Importing `permllm` alone costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from permllm.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["__version__", "load"]


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """A checkpoint in any of the forms of an export, dense or packed, in evaluation mode.

    Args:
        folder: of the checkpoint.
        options: for `AutoModelForCausalLM.from_pretrained`, such as `dtype`, `device_map` or `keep_packed=True`.

    Raises:
        DataError: it is not whole; the tensor is named.
    """
    import torch

    import permllm.export  # noqa: F401 - makes its classes known to transformers
    from permllm.models.checkpoint import read_weights

    return read_weights(Path(folder), options.pop("dtype", None), torch.device("cpu"), **options).eval()
