"""Masks with a lower output error, by exchanges within the groups of the pruner's masks.

Let `W (C_out, C_in)` be a weight, `X (tokens, C_in)` its inputs and `H = X^T X`. If a mask removes
`e` from a row of W, the squared error of the output grows by `e H e^T`. Wanda's saliency uses only
the diagonal of H. The search here is coordinate descent on the whole error. In one group after the
other, a kept and a pruned weight change places if the error falls, while all other groups keep
their masks. There are at most three passes over the groups, with one exchange in each. SparseSwaps
(arXiv 2512.10922) uses the same error, and exchanges one pair in a row at a step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from permllm.mask.base import Mask
from permllm.models.families import linear_at
from permllm.models.layers import LayerStream
from permllm.runtime.precision import products_in
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.statistics import Gram, by_layer, collecting
from permllm.store.tensors import PackedMasks
from permllm.training.problem import LearningProblem

# Channels in a block. An exchange updates the products with H in its own block at once; the other
# products are updated after the block.
_BLOCK = 64
# Largest number of sweeps over the groups of a linear. The first sweeps gain most.
_SWEEPS = 3


class RefinedMask(Mask):
    """Refinement of the pruner's masks by the inputs of the linears in the dense model."""

    statistics = (Gram,)

    @override
    @torch.no_grad()
    def masks(self, problem: LearningProblem, permutations: Mapping[str, Tensor]) -> PackedMasks:
        """Refine the masks of all linears, layer by layer."""
        stream = LayerStream(problem.model, problem.calibration, problem.calibration_batch_size)
        masks = PackedMasks()
        for layer, groups in by_layer(problem.model, problem.groups, "refine masks"):
            with collecting(problem.model, groups, self.statistics) as statistics:
                stream.advance(layer)
            for group in groups:
                permutation = permutations[group.name].to(problem.device)
                gram = statistics[group.name][Gram].value[permutation][:, permutation]
                weights = [linear_at(problem.model, path).weight for path in group.members]
                saliencies = (problem.saliency_of(path) for path in group.members)
                start = [
                    permuted_nm_mask(score, permutation, problem.pattern) for score in saliencies
                ]
                # Linears that read the same channels are refined together, which takes fewer
                # operations. Products in half precision would give wrong exchanges.
                with products_in(gram.dtype, problem.device):
                    mask = refined_mask(
                        torch.cat(weights)[:, permutation],
                        torch.cat(start)[:, permutation],
                        gram,
                        problem.pattern,
                    )
                parts = (
                    mask[:, permutation.argsort()].cpu().split([len(weight) for weight in weights])
                )
                masks.update(zip(group.members, parts, strict=True))
        return masks


@torch.no_grad()
def refined_mask(
    weight: Tensor, mask: Tensor, gram: Tensor, pattern: NMPattern, sweeps: int = _SWEEPS
) -> Tensor:
    """Return a mask that lowers `e H e^T` of each row, or keeps it.

    If a kept weight w_i is pruned and a pruned weight w_j is kept, the error of a row changes by

        w_i^2 H_ii + 2 w_i (H e)_i + w_j^2 H_jj - 2 w_j (H e)_j - 2 w_i w_j H_ij

    Args:
        weight: `(C_out, C_in)`; groups are M consecutive columns.
        mask: bool, same shape, N:M.
        gram: H, float `(C_in, C_in)`, symmetric.
        sweeps: largest number of sweeps over all groups; a sweep without a change ends the search.

    Returns:
        bool `(C_out, C_in)`.
    """
    m = pattern.m
    # Transposed, so that operations on a group are vectorised over the output rows.
    weight_t = weight.t().to(gram.dtype).contiguous()
    keep = mask.t().clone(memory_format=torch.contiguous_format)
    removed = torch.where(keep, 0.0, weight_t)
    product = gram @ removed
    squares = weight_t.square() * gram.diagonal().unsqueeze(1)
    places = torch.arange(m, device=weight.device).unsqueeze(1)
    size = m * max(1, _BLOCK // m)
    for _ in range(sweeps):
        keep_before = keep.clone()
        for first in range(0, len(keep), size):
            block = slice(first, min(first + size, len(keep)))
            block_product = product[block].clone()
            removed_before = removed[block].clone()
            for start in range(first, block.stop, m):
                group = slice(start, start + m)
                w = weight_t[group]
                linear = 2 * w * block_product[start - first : start - first + m]
                pruning = torch.where(keep[group], squares[group] + linear, torch.inf)
                keeping = torch.where(keep[group], torch.inf, squares[group] - linear)
                both = (2 * gram[group, group]).unsqueeze(2) * w.unsqueeze(0) * w.unsqueeze(1)
                changes = pruning.unsqueeze(1) + keeping.unsqueeze(0) - both
                change, pair = changes.flatten(0, 1).min(0)
                lowers = change < 0
                leaving = pair // m
                entering = pair % m
                keep[group] ^= lowers & ((places == leaving) | (places == entering))
                removed_after = torch.where(keep[group], 0.0, w)
                block_product.addmm_(gram[block, group], removed_after - removed[group])
                removed[group] = removed_after
            product.addmm_(gram[:, block], removed[block] - removed_before)
        if torch.equal(keep, keep_before):
            break
    return keep.t()
