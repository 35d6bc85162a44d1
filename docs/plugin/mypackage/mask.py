"""Masks that replace the pruner's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from permllm.mask.base import Mask
from permllm.sparsity.nm import permuted_nm_mask
from permllm.training.problem import LearningProblem


class RandomMask(Mask):
    """Random N:M masks: the baseline that every pruner should beat."""

    def masks(
        self, problem: LearningProblem, permutations: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the masks by linear, bool `(C_out, C_in)` on the CPU, original channel order.

        Args:
            problem: the model, its channel groups and the samples.
            permutations: permutation of each channel group, int64 `(C_in,)` on the CPU.
        """
        generator = torch.Generator().manual_seed(problem.seed)
        found = {}
        for group in problem.groups:
            for path, rows in zip(group.members, group.rows, strict=True):
                score = torch.rand(rows, group.channels, generator=generator)
                permutation = permutations[group.name]
                found[path] = permuted_nm_mask(score, permutation, problem.pattern)
        return found
