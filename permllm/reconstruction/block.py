"""Gradient descent on the kept weights of one decoder layer, until its output is again what the dense model's is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm.errors import TrainingError
from permllm.models.decoder import run_layer
from permllm.models.losses import mean_square_loss
from permllm.reconstruction.base import NoReconstruction, PrunedLayer
from permllm.reconstruction.masked_adam import MaskedAdam
from permllm.validation import check_number, check_whole


@dataclass(frozen=True)
class Block(NoReconstruction):
    """Adam on the kept weights, layer by layer; inputs as the pruned layers before give them, targets the dense outputs.

    The layer's best weights by the loss of a whole pass are kept, the ones it began with included.

    Args:
        passes: over the calibration samples.
        learning_rate: of Adam at the start, with a cosine schedule to zero.
    """

    passes: int = 4
    learning_rate: float = 3e-4
    changes_weights = True

    def __post_init__(self) -> None:
        check_whole("reconstruction.passes", self.passes, 1)
        check_number("reconstruction.learning_rate", self.learning_rate, positive=True)

    def layer(self, pruned: PrunedLayer) -> None:
        """Train the layer's linears in place. Raises TrainingError when the loss is not finite."""
        optimizer = MaskedAdam(pruned.linears, pruned.masks, self.learning_rate, self.passes * len(pruned.inputs))
        best = self._loss(pruned)
        kept = [weight.detach().clone() for weight in optimizer.weights]
        for _ in range(self.passes):
            for batch in range(len(pruned.inputs)):
                with optimizer.gradients():
                    self._batch_loss(pruned, batch).backward()
                optimizer.step()
            loss = self._loss(pruned)
            if loss < best:
                best, kept = loss, [weight.detach().clone() for weight in optimizer.weights]
        for weight, found in zip(optimizer.weights, kept, strict=True):
            weight.data.copy_(found)

    @torch.no_grad()
    def _loss(self, pruned: PrunedLayer) -> float:
        samples = sum(len(batch) for batch in pruned.inputs)
        loss = sum(float(self._batch_loss(pruned, batch)) * len(pruned.inputs[batch]) for batch in range(len(pruned.inputs)))
        if not loss < float("inf"):
            raise TrainingError("reconstruction=block: the loss is not finite; a lower reconstruction.learning_rate may help")
        return loss / samples

    def _batch_loss(self, pruned: PrunedLayer, batch: int) -> Tensor:
        device = pruned.linears[0].weight.device
        output = run_layer(pruned.layer, pruned.inputs[batch].to(device), dict(pruned.kwargs[batch]))
        return mean_square_loss(output, pruned.targets[batch].to(device))
