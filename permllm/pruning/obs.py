"""Optimal brain surgeon: SparseGPT's correction of the kept weights, under masks that are given."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from permllm.pruning.reconstruction import NoReconstruction, PrunedLinear
from permllm.pruning.reconstruction_settings import OBSSettings
from permllm.pruning.sparsegpt import SparseGPT
from permllm.sparsity.statistics import Statistics


class OBS(OBSSettings, NoReconstruction):
    """Each pruned weight's error is made up for by the kept weights after it, column by column (arXiv 2301.00774)."""

    changes_weights = True
    statistics: ClassVar[Statistics] = SparseGPT.statistics

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """The corrected weight, from the dense one."""
        assert pruned.statistics is not None
        updater = SparseGPT(self.damping)
        weight, mask = updater.update(pruned.dense, pruned.statistics, pruned.perm, pruned.pattern, pruned.mask)
        assert torch.equal(mask, pruned.mask)
        return weight
