"""Attention in float32 while a CPU learns in half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from permllm.runtime.precision import products_as_they_are


@contextmanager
def attention_in_float32(device: torch.device) -> Iterator[None]:
    """Compute attention in float32 where a CPU needs its gradients, although autocast is on.

    The backward of torch's attention takes three times as long in bfloat16 as in float32 with
    windows of 128 tokens. Long windows gain nothing from bfloat16 either.

    Args:
        device: the device of the model.
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
        if mask is not None and mask.is_floating_point():  # a bool mask stays as it is
            mask = mask.float()
        with products_as_they_are(query):
            return narrow(module, query.float(), key.float(), value.float(), mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = wide
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = narrow
