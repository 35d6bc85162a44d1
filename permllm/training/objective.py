"""The loss of a window of decoder layers, forward and backward, and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from permllm.models.families import ChannelGroup
from permllm.models.layers import layer_inputs, run_layer
from permllm.models.offload import placement_of
from permllm.runtime import parallel
from permllm.runtime.memory import free_memory
from permllm.runtime.precision import product_dtype, recomputed
from permllm.training.batches import Batch, Batches
from permllm.training.learner import Learner, Moment, Window
from permllm.training.losses import loss_named
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

# What layers may keep for backward: a share of a GPU's free memory; bytes on a CPU, whose memory
# others use too.
_SHARE_OF_FREE, KEPT_ON_A_HOST = 0.8, 4e9


class Objective:
    """The loss of a window, as its learner sets the layers.

    Args:
        settings: of the descent.
        problem: the model, whose linears in the window are masked linears now or hold the weights
            that learn, and the samples.
        window: the layers.
        learner: what learns.
        steps: of the whole training.
        optimizer: whose tensors need memory too.
        scaler: of the gradients.
    """

    def __init__(
        self,
        settings: LearningSettings,
        problem: LearningProblem,
        window: Window,
        learner: Learner,
        steps: int,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.window = window
        self.learner = learner
        self._optimizer, self._scaler = optimizer, scaler
        self._placement = placement_of(problem.model)
        self._layers = range(window.first, window.stop)
        tokens = steps * settings.batch_size * problem.tokens.shape[1]
        self._distance = loss_named(str(settings.loss), problem.model, tokens, settings.compile)
        self._samples = Batches(problem.tokens, window.target, window.inputs, problem.device)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._recomputes: bool | None = None

    def backward(self, batch: Tensor, moment: Moment, after: Tensor | None = None) -> Tensor:
        """Return the loss of this rank's portions of a batch, a part of the mean over all of it, whose gradients are left.

        Args:
            batch: int64 `(samples,)`.
            moment: of the step.
            after: the next batch, to be fetched while the device works on this one; None where
                there is none.
        """
        portions = parallel.portions(batch, self.settings.micro_batch_size)
        following = (
            [] if after is None else parallel.portions(after, self.settings.micro_batch_size)
        )
        total = torch.zeros((), device=self.problem.device)
        for (portion, counted), ahead in zip_longest(portions, [*portions[1:], *following[:1]]):
            loss = self.loss(portion, moment) * (counted / len(batch))
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
            if ahead is not None:
                self._samples.fetch(ahead[0])
        self.learner.collect()
        return total

    @torch.no_grad()
    def mean(self, count: int) -> float:
        """Return the loss of the first samples with what was learned so far, mean over tokens."""
        total = torch.zeros((), dtype=torch.float64, device=self.problem.device)
        for batch, counted in parallel.portions(
            torch.arange(count), self.problem.calibration_batch_size
        ):
            total += self.loss(batch, None).double() * counted
        parallel.all_reduce([total])
        return float(total) / count

    @torch.no_grad()
    def broken(self, indices: Tensor) -> str:
        """Say which layer gives something that is not finite for some of the samples; all ranks look at all of them."""
        for batch in indices.split(self.problem.calibration_batch_size):
            hidden, kwargs = self._inputs(self._samples.take(batch))
            found = None
            for index in self._layers:  # all of them, as other ranks do
                hidden = self._layer(index, hidden, kwargs[index], None)
                if found is None and not bool(hidden.isfinite().all()):
                    found = index
            if found is not None:
                return f"the loss is not finite: the output of decoder layer {found} is not"
        return "the loss is not finite, although the output of every layer is"

    def loss(self, indices: Tensor, moment: Moment | None) -> Tensor:
        """Return the loss of the samples at `indices`, mean over tokens; None for the moment asks for no gradients."""
        batch = self._samples.take(indices)
        hidden, kwargs = self._inputs(batch)
        recompute = torch.is_grad_enabled() and self._recompute(hidden)
        for index in self._layers:
            if recompute:
                hidden = recomputed(self._layer, index, hidden, kwargs[index], moment)
            else:
                hidden = self._layer(index, hidden, kwargs[index], moment)
        return self._distance(hidden, batch.target)

    def _layer(
        self, index: int, hidden: Tensor, kwargs: dict[str, Any], moment: Moment | None
    ) -> Tensor:
        """Run one decoder layer as the learner sets it; a layer that is recomputed is set anew in backward."""
        self.learner.set_layer(index, moment if torch.is_grad_enabled() else None)
        with self._placement.layer(index) as layer:
            return run_layer(layer, hidden, kwargs)

    def _inputs(self, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the input of the window's first layer, and the keyword arguments of all layers."""
        samples = len(batch.tokens)
        if batch.inputs is not None and samples in self._kwargs:
            return batch.inputs, self._kwargs[samples]
        found = layer_inputs(self.problem.model, batch.tokens)
        self._kwargs[samples] = found.kwargs
        return (found.hidden if batch.inputs is None else batch.inputs), found.kwargs

    def _recompute(self, hidden: Tensor) -> bool:
        """Tell whether backward computes each layer anew instead of keeping what it needs; decided at the first step."""
        if self._placement.streams:  # else what backward needs would hold the weights of all layers
            return True
        if self.settings.activation_checkpointing is not None:
            return self.settings.activation_checkpointing
        if self._recomputes is None:
            tokens, item = hidden.numel() // hidden.shape[-1], hidden.element_size()
            kept = (
                tokens
                * kept_a_token(self.problem.groups, hidden.shape[-1], item, self.learner.gathers)
                * item
            )
            allowed = KEPT_ON_A_HOST
            if hidden.device.type == "cuda":
                allowed = _SHARE_OF_FREE * (
                    free_memory(hidden.device) - self._not_yet_taken(hidden)
                )
            self._recomputes = kept * len(self._layers) > allowed
        return self._recomputes

    def _not_yet_taken(self, hidden: Tensor) -> float:
        """Return the bytes that a step takes beside activations, and that are free as long as none was made."""
        learning = [values for group in self._optimizer.param_groups for values in group["params"]]
        size = sum(values.numel() * values.element_size() for values in learning)
        moments = 0 if self._optimizer.state else 2  # a checkpoint has brought them
        # What a weight that learns is rounded to for products waits for backward.
        product = product_dtype(hidden)
        rounded = sum(
            weight.numel() * product.itemsize
            for weight in self.problem.model.parameters()
            if weight.requires_grad and weight.dtype != product
        )
        return size * (1 + moments) + rounded + self.learner.masked_weights() * product.itemsize


def kept_a_token(
    groups: Iterable[ChannelGroup], hidden: int, item: int, gathers: bool = False
) -> int:
    """Return the numbers a token that a decoder layer keeps for backward: 11 vectors of the residual stream, 4 of the MLP.

    Args:
        groups: channel groups of the model.
        hidden: width of the residual stream.
        item: bytes of one of them.
        gathers: each linear keeps its inputs in an order of its own, which otherwise are one tensor
            for a group. In float32 that is within what is said of all; in half precision norms,
            which compute in float32, take that room.
    """
    groups = list(groups)
    inner = max(
        (group.channels for group in groups if group.table.producers and not group.table.by_head),
        default=hidden,
    )
    layers = len({group.layer for group in groups})
    copies = (
        sum(group.channels * (len(group.members) - 1) for group in groups) // layers
        if gathers and item < 4
        else 0
    )
    return 11 * hidden + 4 * inner + copies
