"""The elementwise work of a masked linear on a piece of its channels: saliency, mask, soft mask and its backward.

Two forms of the same mathematics. As whole tensors it is a dozen passes over memory, which is the best that eager execution
can do. Place by place, as M slices that never meet until the end, a compiler turns it into one pass; written as whole tensors
it cannot, because it does not vectorise a softmax or a stack across the places of a group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from permllm.pruning.saliency import SaliencyFactors, saliency_t
from permllm.sparsity import keep_largest, keep_largest_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """Both kernels of a masked linear.

    Arguments of each:

    weight_t `(C_in, C_out)`, channels int64 `(k,)`: the piece is `w = weight_t[channels]`, whole groups of M.
    power, column `(K, k)`, row `(K, C_out)` or None: the saliency factors of the piece.
    n, m: the pattern.
    dtype: of what is returned; saliencies and masks are made in the dtype of the saliency.

    Attributes:
        mask: the piece times its N:M mask, `(k, C_out)`.
        gradient: takes before `n` also `grad`, `(C_in, C_out)`, the gradient of the masked weight_t, and at the end also
            `hard`, bool: which mask is given back. Returns the piece times its mask; the saliency; the gradient of the
            saliency; the gradient of the mask; the mask, hard or soft.
        cpu_piece: number of weights to pass at a time on a CPU.
    """

    mask: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    cpu_piece: int

    def piece(self, device_type: str) -> int:
        """Number of weights to pass at a time. A GPU needs enough to hide the launches, yet little against a layer."""
        return self.cpu_piece if device_type == "cpu" else 1 << 25


def _mask(
    weight_t: Tensor, channels: Tensor, power: int, column: Tensor, row: Tensor | None, n: int, m: int, dtype: torch.dtype
) -> Tensor:
    w = weight_t.index_select(0, channels)
    s = saliency_t(w, SaliencyFactors(power, column, row))
    return w.mul_(keep_largest(s.unflatten(0, (-1, m)), n, dim=1).flatten(0, 1)).to(dtype)


def _gradient(
    weight_t: Tensor,
    channels: Tensor,
    power: int,
    column: Tensor,
    row: Tensor | None,
    grad: Tensor,
    n: int,
    m: int,
    dtype: torch.dtype,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = weight_t.index_select(0, channels)
    s = saliency_t(w, SaliencyFactors(power, column, row))
    groups = s.unflatten(0, (-1, m))
    keep = keep_largest(groups, n, dim=1).flatten(0, 1)
    grad_mask = grad.index_select(0, channels).to(s.dtype).mul_(w)
    soft_mask = groups.softmax(1)
    grad_s = grad_mask.view_as(groups) * soft_mask
    grad_s -= soft_mask * grad_s.sum(1, keepdim=True)
    mask = keep if hard else soft_mask.flatten(0, 1)
    return (
        w.mul_(keep).to(dtype),
        s.to(dtype),
        grad_s.flatten(0, 1).to(dtype),
        grad_mask.to(dtype),
        mask.to(dtype),
    )


# The temporaries of a dozen passes should stay in a core's second-level cache.
EAGER = Kernels(_mask, _gradient, cpu_piece=1 << 17)


def _places(t: Tensor, m: int) -> list[Tensor]:
    return [t[place::m] for place in range(m)]


def _join(places: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([place.to(dtype) for place in places], 1).flatten(0, 1)


def _saliency_places(w: list[Tensor], power: int, column: Tensor, row: Tensor | None) -> list[Tensor]:
    m = len(w)
    return [saliency_t(part, SaliencyFactors(power, column[:, place::m], row)) for place, part in enumerate(w)]


def _mask_by_places(
    weight_t: Tensor, channels: Tensor, power: int, column: Tensor, row: Tensor | None, n: int, m: int, dtype: torch.dtype
) -> Tensor:
    w = _places(weight_t.index_select(0, channels), m)
    keep = keep_largest_of(_saliency_places(w, power, column, row), n)
    return _join([torch.where(kept, part, 0.0) for kept, part in zip(keep, w, strict=True)], dtype)


def _gradient_by_places(
    weight_t: Tensor,
    channels: Tensor,
    power: int,
    column: Tensor,
    row: Tensor | None,
    grad: Tensor,
    n: int,
    m: int,
    dtype: torch.dtype,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = _places(weight_t.index_select(0, channels), m)
    s = _saliency_places(w, power, column, row)
    keep = keep_largest_of(s, n)
    grad_mask = [
        part.to(s[0].dtype) * weight for part, weight in zip(_places(grad.index_select(0, channels), m), w, strict=True)
    ]
    largest = s[0]
    for part in s[1:]:
        largest = torch.maximum(largest, part)
    exponentials = [(part - largest).exp() for part in s]
    total = sum(exponentials[1:], exponentials[0])
    soft_mask = [part / total for part in exponentials]
    products = [grad_part * soft for grad_part, soft in zip(grad_mask, soft_mask, strict=True)]
    mean = sum(products[1:], products[0])
    grad_s = [product - soft * mean for product, soft in zip(products, soft_mask, strict=True)]
    masked = [torch.where(kept, part, 0.0) for kept, part in zip(keep, w, strict=True)]
    return (
        _join(masked, dtype),
        _join(s, dtype),
        _join(grad_s, dtype),
        _join(grad_mask, dtype),
        _join(keep if hard else soft_mask, dtype),
    )


@cache
def compiled_kernels(device_type: str) -> Kernels | None:
    """The kernels compiled for `cpu` or `cuda`; None, with a warning, where this machine cannot (no compiler, for one)."""
    # Without fullgraph: where the recompile limit is reached, a call runs as it stands instead of raising.
    mask, gradient = torch.compile(_mask_by_places, dynamic=True), torch.compile(_gradient_by_places, dynamic=True)
    kernels = Kernels(mask, gradient, cpu_piece=1 << 20)
    probe = torch.ones(8, 2, device=device_type)
    channels = torch.arange(8, device=device_type)
    try:
        kernels.mask(probe, channels, 1, probe.t()[:1], None, 2, 4, torch.float32)
    except Exception as error:  # whatever the compiler, its cache or its driver may raise
        log.warning("learning runs without compiled kernels: %s", str(error).strip().splitlines()[0][:200])
        return None
    return kernels
