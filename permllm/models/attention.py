"""Number format of attention: float32 while a CPU learns in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from permllm.runtime.precision import products_as_they_are


@contextmanager
def attention_in_float32(device: torch.device) -> Iterator[None]:
    """Compute attention in float32 where gradients go through it on a CPU, despite autocast.

    Torch's backward of it takes three times as long in bfloat16 for windows of 128 tokens, and no
    less for long ones.

    Args:
        device: where the model is.
    """
    if device.type != "cpu" or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
        yield
        return
    narrow = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wide(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Any:
        with products_as_they_are(query):
            return narrow(
                module, query.float(), key.float(), value.float(), _float32(mask), **options
            )

    ALL_ATTENTION_FUNCTIONS["sdpa"] = wide
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = narrow


def _float32(mask: Tensor | None) -> Tensor | None:
    """A mask that says which tokens are seen stays as it is."""
    return mask.float() if mask is not None and mask.is_floating_point() else mask
