"""Masks of a lower output error, by exchanges within the groups of the pruner's masks.

Let `W (C_out, C_in)` be a weight, `X (tokens, C_in)` its inputs and `H = X^T X`. If a mask removes
`e` of a row of W, it adds `e H e^T` to the squared error of the output. Wanda's saliency ranks by
the diagonal of H alone. Here a kept and a pruned weight of a group change places where the whole
error falls, group after group, given the masks of all others: coordinate descent, which ends where
no exchange within a group gains anything. SparseSwaps (arXiv 2512.10922) exchanges by the same
error, one pair of a row a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from permllm.config import NMPattern
from permllm.mask.base import FoundMask
from permllm.models.families import linear_at
from permllm.models.layers import LayerStream
from permllm.runs.tensors import PackedMasks
from permllm.runtime.precision import products_in
from permllm.sparsity.calibrate import by_layer, collecting
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.statistics import Gram
from permllm.training.problem import LearningProblem

# Channels whose products with H follow each exchange; those of all others follow once for so many.
_BLOCK = 64
# Sweeps over the groups of a linear: the first ones bring most of the gain.
_SWEEPS = 3


class RefinedMask(FoundMask):
    """The pruner's masks, refined on the inputs of the linears in the dense model.

    Nothing learns, no weight changes.
    """

    statistics = (Gram,)

    @override
    @torch.no_grad()
    def masks(self, problem: LearningProblem, orders: Mapping[str, Tensor]) -> PackedMasks:
        tokens = problem.tokens if problem.calibration is None else problem.calibration
        stream = LayerStream(problem.model, tokens, problem.calibration_batch_size)
        masks = PackedMasks()
        for layer, groups in by_layer(problem.model, problem.groups, "refine masks"):
            with collecting(problem.model, groups, self.statistics) as statistics:
                stream.advance(layer)
            for group in groups:
                pattern, order = problem.pattern_of(group), orders[group.name].to(problem.device)
                gram = statistics[group.name][Gram].value[order][:, order]
                weights = [linear_at(problem.model, path).weight for path in group.members]
                saliencies = (problem.saliency_of(path) for path in group.members)
                start = [permuted_nm_mask(score, order, pattern) for score in saliencies]
                # Linears that read the same channels are refined together: the more rows, the
                # fewer passes. Products in a narrower format would decide wrongly.
                with products_in(gram.dtype, problem.device):
                    mask = refined_mask(
                        torch.cat(weights)[:, order], torch.cat(start)[:, order], gram, pattern
                    )
                parts = mask[:, order.argsort()].cpu().split([len(weight) for weight in weights])
                masks.update(zip(group.members, parts, strict=True))
        return masks


@torch.no_grad()
def refined_mask(
    weight: Tensor, mask: Tensor, gram: Tensor, pattern: NMPattern, sweeps: int = _SWEEPS
) -> Tensor:
    """Return a mask for which `e H e^T` of no row is larger, up to rounding.

    If a kept weight w_i goes and a pruned one w_j comes, the error of a row changes by

        w_i^2 H_ii + 2 w_i (H e)_i + w_j^2 H_jj - 2 w_j (H e)_j - 2 w_i w_j H_ij

    Args:
        weight: `(C_out, C_in)`; groups are M consecutive columns.
        mask: bool, same shape, N:M.
        gram: float `(C_in, C_in)`, symmetric: H.
        pattern: N:M.
        sweeps: over all groups, at most; the search ends where a sweep changes nothing.

    Returns:
        bool `(C_out, C_in)`.
    """
    m = pattern.m
    # Transposed: groups are M consecutive rows, and passes are vectorised along the others.
    weight_t = weight.t().to(gram.dtype).contiguous()
    keep = mask.t().clone(memory_format=torch.contiguous_format)
    away = torch.where(keep, 0.0, weight_t)
    product = gram @ away
    squares = weight_t.square() * gram.diagonal().unsqueeze(1)
    places = torch.arange(m, device=weight.device).unsqueeze(1)
    size = m * max(1, _BLOCK // m)
    for _ in range(sweeps):
        before = keep.clone()
        for first in range(0, len(keep), size):
            block = slice(first, min(first + size, len(keep)))
            of_block, away_before = product[block].clone(), away[block].clone()
            for start in range(first, block.stop, m):
                group = slice(start, start + m)
                w, kept = weight_t[group], keep[group]
                linear = 2 * w * of_block[start - first : start - first + m]
                leaves = torch.where(kept, squares[group] + linear, torch.inf)
                comes = torch.where(kept, torch.inf, squares[group] - linear)
                both = (2 * gram[group, group]).unsqueeze(2) * w.unsqueeze(0) * w.unsqueeze(1)
                gain, pair = (leaves.unsqueeze(1) + comes.unsqueeze(0) - both).flatten(0, 1).min(0)
                pair = pair.where(gain < 0, -m - 1)  # at no place
                kept ^= (places == pair // m) | (places == pair % m).logical_and_(gain < 0)
                now = torch.where(kept, 0.0, w)
                of_block.addmm_(gram[block, group], now - away[group])
                away[group] = now
            product.addmm_(gram[:, block], away[block] - away_before)
        if torch.equal(keep, before):
            break
    return keep.t()
