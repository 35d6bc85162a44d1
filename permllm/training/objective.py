"""Loss of a stage: forward and backward through its layers, and the memory that they need."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from permllm.models.families import ChannelGroup
from permllm.models.layers import layer_inputs, run_layer
from permllm.models.offload import placement_of
from permllm.runtime import parallel
from permllm.runtime.memory import free_memory, to_device
from permllm.runtime.precision import product_dtype
from permllm.settings.learning import LearningSettings
from permllm.training.learner import Learner, Stage
from permllm.training.losses import loss_named
from permllm.training.problem import LearningProblem

# Limit of the activations that layers keep for backward: a share of a GPU's free memory, or bytes
# on a CPU, where other programs need memory too.
_SHARE_OF_FREE = 0.8
KEPT_ON_A_HOST = 4e9


class Objective:
    """Loss of a stage and its gradients.

    Args:
        problem: the text, and the model with the stage's masked linears or trained weights.

    Attributes:
        scaler: scaler of the loss, because in float16 the gradients of a mean over tokens would
            vanish. It skips a step whose gradients overflow.
    """

    def __init__(
        self,
        settings: LearningSettings,
        problem: LearningProblem,
        stage: Stage,
        learner: Learner,
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.stage = stage
        self.learner = learner
        self.device = problem.device
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=next(problem.model.parameters()).dtype == torch.float16
        )
        self._placement = placement_of(problem.model)
        windows, length = problem.tokens.shape
        tokens = settings.steps_for(windows) * settings.batch_size * length
        self._distance = loss_named(
            str(settings.loss), problem.model, tokens, settings.compile, settings.cross_entropy
        )
        # Backward would otherwise hold the weights of all layers. None: the first step decides.
        self._recomputes = True if self._placement.streams else settings.activation_checkpointing

    def backward(self, batch: Tensor) -> Tensor:
        """Compute the gradients of this rank's portions of a batch; return their part of the loss.

        The loss is the mean over the whole batch, int64 `(windows,)`.
        """
        total = torch.zeros((), device=self.device)
        for windows, counted in parallel.portions(batch, self.settings.micro_batch_size):
            share = counted / len(batch)
            loss = self._loss(windows)
            objective = (loss + self.learner.penalty()) * share
            self.scaler.scale(objective).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach() * share
        self.learner.collect()
        return total

    @torch.no_grad()
    def mean(self) -> float:
        """Return the loss of the present result, mean over all windows."""
        count = len(self.problem.tokens)
        at_once = self.problem.calibration_batch_size
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for windows, counted in parallel.portions(torch.arange(count), at_once):
            total += self._loss(windows).double() * counted
        parallel.all_reduce([total])
        return float(total) / count

    @torch.no_grad()
    def broken(self, windows: Tensor) -> str:
        """Name the first layer whose output is not finite for some windows, alike in all ranks."""
        for batch in windows.split(self.problem.calibration_batch_size):
            hidden, arguments = self._inputs(batch)
            broken_layers = []
            for index in self.stage.layers:  # all layers, because all ranks enter each
                hidden = self._layer(index, hidden, arguments[index])
                if not bool(hidden.isfinite().all()):
                    broken_layers.append(index)
            if broken_layers:
                return (
                    f"the loss is not finite: the output of decoder layer {broken_layers[0]} is not"
                )
        return "the loss is not finite, although the output of every layer is"

    def _loss(self, windows: Tensor) -> Tensor:
        """Return the loss of some windows, int64 `(windows,)`, mean over tokens."""
        hidden, arguments = self._inputs(windows)
        layer = self._layer
        if torch.is_grad_enabled() and self._recompute(hidden):
            layer = partial(checkpoint, self._layer, use_reentrant=False)
        for index in self.stage.layers:
            hidden = layer(index, hidden, arguments[index])
        target = to_device(self.stage.target[windows], self.device)
        return self._distance(hidden, target, self.problem.tokens[windows])

    def _layer(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run a decoder layer as the learner sets it; backward may run it again."""
        self.learner.set_layer(index)
        with self._placement.layer(index) as layer:
            return run_layer(layer, hidden, arguments)

    def _inputs(self, windows: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        hidden, arguments = layer_inputs(self.problem.model, self.problem.tokens[windows])
        if self.stage.inputs is not None:
            hidden = to_device(self.stage.inputs[windows], self.device)
        return hidden, arguments

    def _recompute(self, hidden: Tensor) -> bool:
        if self._recomputes is None:
            width = hidden.shape[-1]
            item = hidden.element_size()
            a_token = kept_a_token(self.problem.groups, width, item, self.learner.gathers)
            activations = hidden.numel() // width * a_token * item * len(self.stage.layers)
            allowed = KEPT_ON_A_HOST
            if self.device.type == "cuda":
                free = free_memory(self.device) - self._first_step_bytes(hidden)
                allowed = _SHARE_OF_FREE * free
            self._recomputes = activations > allowed
        return self._recomputes

    def _first_step_bytes(self, hidden: Tensor) -> float:
        """Return the bytes that the first step allocates for other purposes than activations."""
        # Gradients, and the two moments of the optimizer.
        learned = 3 * sum(values.nbytes for values in self.learner.parameters())
        # The rounded copy of a trained weight stays in memory until backward.
        product = product_dtype(hidden)
        rounded = sum(
            weight.numel() * product.itemsize
            for weight in self.problem.model.parameters()
            if weight.requires_grad and weight.dtype != product
        )
        return learned + rounded + self.learner.masked_weights * product.itemsize


def kept_a_token(
    groups: Sequence[ChannelGroup], hidden: int, item: int, gathers: bool = False
) -> int:
    """Return the number of values that a decoder layer keeps for backward, for each token.

    They are 11 vectors of the residual stream, `hidden` wide, and 4 of the MLP.

    Args:
        item: bytes of a value.
        gathers: each linear keeps its own permuted inputs, instead of one tensor for a group. In
            float32 the 15 vectors include these copies; in half precision the norms take their
            place, which compute in float32.
    """
    inner = max(
        (group.channels for group in groups if group.table.producers and not group.table.by_head),
        # The family has no table, or the MLP's second linear is not pruned.
        default=max(max(group.channels, *group.rows) for group in groups),
    )
    copies = 0
    if gathers and item < 4:
        layers = len({group.layer for group in groups})
        copies = sum(group.channels * (len(group.members) - 1) for group in groups) // layers
    return 11 * hidden + 4 * inner + copies
