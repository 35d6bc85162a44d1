"""Gradient descent on the kept weights of one decoder layer, until its output is again what the dense model's is."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm.errors import TrainingError
from permllm.models.decoder import run_layer
from permllm.models.losses import mean_square_loss
from permllm.reconstruction.base import NoReconstruction, PrunedLayer
from permllm.reconstruction.kept_weights import KeptWeights
from permllm.reconstruction.settings import BlockSettings
from permllm.runtime.precision import gradient_scaler


class Block(BlockSettings, NoReconstruction):
    """Adam on the kept weights, layer by layer; inputs as the pruned layers before give them, targets the dense outputs.

    The layer's best weights by the loss of a whole epoch are kept, the ones it began with included.
    """

    changes_weights = True

    def layer(self, pruned: PrunedLayer) -> None:
        """Train the layer's linears in place. Raises TrainingError when the loss is not finite."""
        trained = KeptWeights(pruned.linears, pruned.masks)
        device = trained.values[0].device
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(trained.values, lr=self.learning_rate, fused=fused)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(pruned.inputs))
        scaler = gradient_scaler(trained.weights[0].dtype, device)
        best = self._loss(pruned)
        kept = [value.clone() for value in trained.values]
        for _ in range(self.epochs):
            for batch in range(len(pruned.inputs)):
                optimizer.zero_grad(set_to_none=True)
                with trained.gradients():
                    scaler.scale(self._batch_loss(pruned, batch)).backward()  # type: ignore[no-untyped-call]
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                trained.write()
            loss = self._loss(pruned)
            if loss < best:
                best, kept = loss, [value.clone() for value in trained.values]
        trained.write(kept)

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
