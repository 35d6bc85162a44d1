"""Evaluation with the rounding of vLLM's FP8 kernels (`export.serve=vllm`)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from permllm.models.families import channel_groups, linear_at
from permllm.models.layers import replaced_forwards

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(values: Tensor) -> Tensor:
    """Round values to float8 e4m3 with a scale for each row, as torchao does (`PerRow`).

    The scale of a row is its largest magnitude / 448, computed in bfloat16. A row of zeros stays
    zero.

    Args:
        values: `(..., channels)` in any float dtype; rounded to bfloat16 first.

    Returns:
        Float8 values times scales, float32 of the same shape.
    """
    values = values.bfloat16()
    scale = (values.abs().amax(-1, keepdim=True) / _LARGEST).float()
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = (values.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return codes.float() * scale


@contextmanager
def fp8_products(model: nn.Module) -> Iterator[None]:
    """Let all linears of the decoder layers multiply in FP8 inside the context.

    Weights have a scale for each row, activations for each token. Sums are in float32.
    """
    with ExitStack() as held:
        for group in channel_groups(model):
            for linear in [linear_at(model, path) for path in group.members]:
                held.enter_context(replaced_forwards([linear], partial(_forward, linear)))
        yield


def _forward(linear: nn.Linear, states: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.float()
    # The weight is rounded in each call, because the placement may bring a new copy of it.
    product = nn.functional.linear(rounded(states), rounded(linear.weight), bias)
    return product.to(states.dtype)
