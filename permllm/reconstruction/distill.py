"""Distillation of the dense model into the kept weights of the pruned one, end to end."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from permllm.errors import TrainingError
from permllm.models.decoder import layer_inputs, run_layer
from permllm.models.families import decoder_layers
from permllm.models.head import Head
from permllm.models.losses import head_divergence
from permllm.reconstruction.base import NoReconstruction, PrunedNetwork
from permllm.reconstruction.masked_adam import MaskedAdam
from permllm.reconstruction.settings import DistillSettings


class Distill(DistillSettings, NoReconstruction):
    """Adam on all kept weights towards the dense model's next-token distributions, on the calibration text.

    Holds weights, gradients and two moments at once, 16 bytes a weight in float32; layers are recomputed in backward.
    """

    changes_weights = True

    def network(self, pruned: PrunedNetwork) -> None:
        """Train the linears in place. Raises TrainingError when the loss is not finite."""
        head = Head(pruned.model)
        batches = torch.arange(len(pruned.tokens)).split(self.batch_size) * self.epochs
        optimizer = MaskedAdam(pruned.linears, pruned.masks, self.learning_rate, len(batches))
        with tqdm(batches, desc="distill", unit="step") as progress:
            for batch in progress:
                with optimizer.gradients():
                    loss = self._loss(pruned, head, batch)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise TrainingError("reconstruction=distill: the loss is not finite; try a lower learning_rate")
                    loss.backward()
                optimizer.step()
                progress.set_postfix(loss=f"{value:.4f}")

    def _loss(self, pruned: PrunedNetwork, head: Head, batch: Tensor) -> Tensor:
        inputs = layer_inputs(pruned.model, pruned.tokens[batch])
        hidden = inputs.hidden
        for layer, kwargs in zip(decoder_layers(pruned.model), inputs.kwargs, strict=True):
            hidden = checkpoint(run_layer, layer, hidden, kwargs, use_reentrant=False)
        return head_divergence(head, hidden, pruned.target[batch].to(hidden.device))
