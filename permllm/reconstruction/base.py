"""Base of the reconstructions, which change the kept weights under given masks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from permllm.settings.config import NMPattern
from permllm.sparsity.method import Method
from permllm.sparsity.statistics import InputStatistics
from permllm.training.problem import LearningProblem


@dataclass(frozen=True)
class PrunedLinear:
    """Linear after its mask was chosen.

    Attributes:
        dense: the dense weight, `(C_out, C_in)`.
        weight: the weight that the pruner returned, same shape, +0.0 outside of the mask.
        mask: bool, same shape, in original channel order.
        permutation: permutation of the channels, int64 `(C_in,)`.
        pattern: N:M of the permuted mask.
        statistics: statistics of the inputs after the earlier layers are pruned.
    """

    dense: Tensor
    weight: Tensor
    mask: Tensor
    permutation: Tensor
    pattern: NMPattern
    statistics: InputStatistics


@dataclass(frozen=True)
class PrunedNetwork:
    """Model after all of its layers are pruned.

    Attributes:
        problem: the pruned model, and windows of text with the dense model's output. `samples` and
            `skip` of the reconstruction choose the windows.
        linears: the pruned linears.
        masks: bool `(C_out, C_in)` for each linear, on the host; an iteration makes one at a time.
    """

    problem: LearningProblem
    linears: Sequence[nn.Linear]
    masks: Collection[Tensor]
    paths: Any = None
    permutations: Any = None
    replace: Any = None


class Reconstruction(Method):
    """Base of the reconstructions, of one linear after the other and then of the whole model.

    Attributes:
        learned: True: `network` trains the kept weights of all layers together, in all ranks.
        iterations: number of iterations over a linear, each with two products with its Hessian.
    """

    iterations: int = 0

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the new weight of a linear, zero outside of the mask."""
        return pruned.weight

    def network(self, pruned: PrunedNetwork) -> None:
        """Change the weights of all linears in place, zero outside of their masks."""

    @override
    def needs_device(self) -> str | None:
        """Return the reason why all weights must be on the device at once; None: no reason."""
        if not self.learned:
            return None
        return f"reconstruction: {type(self).__name__} trains all kept weights together"
