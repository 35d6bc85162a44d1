"""Base of reconstructions, which change the kept weights once the masks are known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from permllm.config import NMPattern
from permllm.sparsity.method import Method
from permllm.sparsity.statistics import InputStatistics, Statistics
from permllm.training.problem import LearningProblem


@dataclass(frozen=True)
class PrunedLinear:
    """A linear whose mask was chosen.

    Attributes:
        dense: the dense weight, `(C_out, C_in)`.
        weight: the pruned weight as the pruner left it, same shape, +0.0 outside of the mask.
        mask: bool, same shape, original channel order.
        perm: int64 `(C_in,)`.
        pattern: N:M, which the mask obeys in permuted order.
        statistics: those that the reconstruction names, of the inputs that the pruned layers before
            give; None where no weight changes.
    """

    dense: Tensor
    weight: Tensor
    mask: Tensor
    perm: Tensor
    pattern: NMPattern
    statistics: InputStatistics | None


@dataclass(frozen=True)
class PrunedNetwork:
    """The model when all of its layers are pruned.

    Attributes:
        problem: the model with its pruned weights, and windows with the dense model's output: those
            that `samples` and `skip` of the reconstruction ask for, or all of the calibration where
            they are its first ones.
        linears: its pruned linears.
        masks: bool `(C_out, C_in)` for each of them, on the host, made when it is asked for.
    """

    problem: LearningProblem
    linears: Sequence[nn.Linear]
    masks: Collection[Tensor]


class Reconstruction(Method):
    """Base of the reconstructions: of one linear after the other, then of the whole model.

    Attributes:
        learned: it has `network`, which trains the kept weights of all layers together, in all
            ranks together. It has `batch_size`, samples a step, and may have `loss`, as
            `permllm.training.losses` names them.
        changes_weights: false only where it does nothing.
        statistics: classes of statistics that it asks of the calibration text (`permllm.sparsity`).
    """

    changes_weights: bool = True
    statistics: Statistics = ()

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the new weight of a linear, zero outside of the mask."""
        return pruned.weight

    def network(self, pruned: PrunedNetwork) -> None:
        """Change the weights of all linears in place, zero outside of their masks."""

    @override
    def needs_device(self) -> str | None:
        if not self.learned:
            return None
        return f"reconstruction: {type(self).__name__} trains all kept weights together"


class NoReconstruction(Reconstruction):
    """The kept weights stay as the pruner left them."""

    changes_weights = False
