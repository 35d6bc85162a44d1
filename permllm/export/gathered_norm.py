"""RMSNorm whose output comes out in another channel order: the gather costs no pass over memory of its own (CUDA, Triton).

A row is read once in its order for the mean square, and once through the index, from the cache, for the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch
    triton = None


def available() -> bool:
    """Whether Triton is installed; the kernel also needs its tensors on a GPU (or Triton's interpreter)."""
    return triton is not None


def reference(x: Tensor, weight: Tensor, order: Tensor, epsilon: float) -> Tensor:
    """The same by plain indexing: `RMSNorm(x)[..., order]`, computed in float32 as transformers does; `x (..., C)`."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * scaled.to(x.dtype)).index_select(-1, order)


def gathered_rms_norm(x: Tensor, weight: Tensor, order: Tensor, epsilon: float) -> Tensor:
    """`RMSNorm(x)[..., order]` in one kernel.

    Args:
        x: `(..., C)`, contiguous.
        weight: `(C,)`.
        order: int32 `(C,)`.
        epsilon: of the norm.

    Returns:
        Like `x`.
    """
    channels = x.shape[-1]
    out = torch.empty_like(x)
    rows = x.numel() // channels
    block = triton.next_power_of_2(channels)
    warps = min(16, max(1, block // 256))
    with torch.cuda.device_of(x):  # Triton launches where the process is, not where its tensors are
        _kernel[(rows,)](x, weight, order, out, channels, epsilon, block=block, num_warps=warps)
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(x, weight, order, out, channels, epsilon, block: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, block)
        inside = columns < channels
        values = tl.load(x + row * channels + columns, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(values * values) / channels + epsilon)
        source = tl.load(order + columns, mask=inside, other=0)
        gathered = tl.load(x + row * channels + source, mask=inside, other=0.0).to(tl.float32)
        # Rounded to the input's format before the weight, as transformers does.
        scaled = (gathered * scale).to(out.dtype.element_ty).to(tl.float32)
        result = tl.load(weight + source, mask=inside, other=0.0).to(tl.float32) * scaled
        tl.store(out + row * channels + columns, result.to(out.dtype.element_ty), mask=inside)
