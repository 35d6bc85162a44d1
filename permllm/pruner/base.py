"""Base class of the pruners."""

from abc import ABC, abstractmethod

from torch import Tensor

from permllm.settings.config import NMPattern
from permllm.sparsity.method import Method
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics


class Pruner(Method, ABC):
    """Base of the pruners.

    Attributes:
        updates_weights: True: `update` chooses the mask and corrects the kept weights. False: the
            mask keeps the N most salient weights of every M.
    """

    updates_weights: bool = False

    @abstractmethod
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return the saliency factors of `weight (C_out, C_in)`."""

    def update(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        permutation: Tensor,
        pattern: NMPattern,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the updated weight and its mask; `SparseGPT.update` has the arguments."""
        raise NotImplementedError
