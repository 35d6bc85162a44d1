"""Distillation of the dense model into the kept weights of the pruned one, end to end."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from permllm.calibration.statistics.base import Statistics
from permllm.errors import DataError, TrainingError
from permllm.learning.training import too_much_to_keep
from permllm.models.decoder import layer_inputs, run_layer
from permllm.models.families import channel_groups, decoder_layers
from permllm.models.head import Head
from permllm.models.losses import head_divergence
from permllm.reconstruction.admm import ADMM
from permllm.reconstruction.base import NoReconstruction, PrunedLinear, PrunedNetwork, Reconstruction
from permllm.reconstruction.masked_adam import MaskedAdam
from permllm.reconstruction.obs import OBS
from permllm.reconstruction.settings import DistillSettings
from permllm.record.names import DISTILL_CHECKPOINT
from permllm.record.tensors import read_torch, write_torch

log = logging.getLogger(__name__)

# Seconds between checkpoints.
_CHECKPOINT_EVERY = 120.0


class Checkpoint(TypedDict):
    """A distillation after a step: `MaskedAdam.state`, and the run that it is of."""

    run: str
    optimizer: dict[str, Any]


class Distill(DistillSettings, NoReconstruction):
    """Adam on all kept weights towards the dense model's next-token distributions, on the calibration text.

    Holds the weights and what `MaskedAdam` does; layers are recomputed in backward where what it needs is large.
    """

    changes_weights = True

    @property
    def statistics(self) -> Statistics:  # type: ignore[override]
        """Those of what the weights start from."""
        return self._before.statistics

    @property
    def _before(self) -> Reconstruction:
        return {"masked": NoReconstruction, "obs": OBS, "admm": ADMM}[self.start]()

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """The weight that learning starts from."""
        return self._before.linear(pruned)

    def network(self, pruned: PrunedNetwork) -> None:
        """Train the linears in place, from the latest checkpoint. Raises TrainingError when the loss is not finite."""
        head = Head(pruned.model)
        samples = torch.arange(min(len(pruned.tokens), self.samples or len(pruned.tokens)))
        batches = samples.split(self.batch_size)
        steps = self.steps or self.epochs * len(batches)
        optimizer = MaskedAdam(pruned.linears, pruned.masks, self.learning_rate, steps, self.average)
        _restore(pruned, optimizer)
        saved = time.monotonic()
        with tqdm(total=steps, initial=optimizer.done, desc="distill", unit="step") as progress:
            for step in range(optimizer.done, steps):
                batch = batches[step % len(batches)]
                with optimizer.gradients():
                    loss = distillation_loss(pruned.model, head, pruned.tokens[batch], pruned.target[batch])
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise TrainingError("reconstruction=distill: the loss is not finite; try a lower learning_rate")
                    loss.backward()
                optimizer.step()
                progress.update()
                progress.set_postfix(loss=f"{value:.4f}")
                if pruned.directory is not None and time.monotonic() - saved >= _CHECKPOINT_EVERY:
                    state: Checkpoint = {"run": pruned.run, "optimizer": optimizer.state()}
                    write_torch(pruned.directory / DISTILL_CHECKPOINT, state)
                    saved = time.monotonic()
        optimizer.finish()


def distillation_loss(model: nn.Module, head: Head, tokens: Tensor, target: Tensor) -> Tensor:
    """`KL(dense || sparse)` of the next-token distributions, mean over tokens.

    Args:
        model: with the weights as they are now.
        head: of the model.
        tokens: int64 `(batch, length)`.
        target: the dense model's output of the last decoder layer, `(batch, length, hidden)` on any device.
    """
    inputs = layer_inputs(model, tokens)
    hidden, layers = inputs.hidden, decoder_layers(model)
    recompute = too_much_to_keep(hidden, channel_groups(model), len(layers))
    for layer, kwargs in zip(layers, inputs.kwargs, strict=True):
        if recompute:
            hidden = checkpoint(run_layer, layer, hidden, kwargs, use_reentrant=False)
        else:
            hidden = run_layer(layer, hidden, kwargs)
    return head_divergence(head, hidden, target.to(hidden.device))


def _restore(pruned: PrunedNetwork, optimizer: MaskedAdam) -> None:
    """Go on from what an interrupted run left, where that can be."""
    file = pruned.directory / DISTILL_CHECKPOINT if pruned.directory else None
    if file is None or not file.is_file():
        return
    try:
        state = read_torch(file, Checkpoint, optimizer.weights[0].device)
        if state["run"] != pruned.run:
            raise DataError(f"{file} is of another run")
        optimizer.restore(state["optimizer"])
        log.info("distillation continues after step %d", optimizer.done)
    except DataError as error:
        log.warning("%s: distillation begins anew", error)
        file.unlink()
