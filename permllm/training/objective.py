"""Loss of a stage: forward and backward through its layers, and the memory that they need."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from permllm.models.families import ChannelGroup
from permllm.models.layers import arguments_depend_on_tokens, layer_inputs, run_layer
from permllm.models.offload import placement_of
from permllm.runtime import parallel
from permllm.runtime.memory import free_memory, to_device
from permllm.runtime.precision import product_dtype, recomputed
from permllm.training.learner import Learner, Stage
from permllm.training.losses import loss_named
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

# Limit of the activations that layers keep for backward: a share of a GPU's free memory, or bytes
# on a CPU, where other programs need memory too.
_SHARE_OF_FREE = 0.8
KEPT_ON_A_HOST = 4e9


class Batch(NamedTuple):
    """Windows of text on the device.

    Attributes:
        tokens: int64 `(windows, tokens)`.
        target: dense output of the stage's last layer, `(windows, tokens, hidden)`.
        inputs: inputs of the stage's first layer, shaped like `target`; None: the embeddings of the
            tokens.
    """

    tokens: Tensor
    target: Tensor
    inputs: Tensor | None


class Batches:
    """Batches out of windows that are on the host.

    Args:
        tokens, target, inputs: as in `Batch`, for all windows.
        device: device of the batches.
    """

    def __init__(
        self, tokens: Tensor, target: Tensor, inputs: Tensor | None, device: torch.device
    ) -> None:
        self._tokens = tokens
        self._target = target
        self._inputs = inputs
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Tensor, Batch] | None = None

    def fetch(self, indices: Tensor) -> None:
        """Start to copy the windows at `indices`, int64 `(windows,)`, while a GPU computes."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._ahead = indices, self._copied(indices)

    def take(self, indices: Tensor) -> Batch:
        """Return the windows at `indices`; `fetch` may have started to copy them."""
        ahead = self._ahead
        self._ahead = None
        if self._stream is None or ahead is None or not torch.equal(ahead[0], indices):
            return self._copied(indices)
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._stream)
        for tensor in ahead[1]:
            if tensor is not None:
                tensor.record_stream(now)  # or torch could reuse its memory during the step
        return ahead[1]

    def _copied(self, indices: Tensor) -> Batch:
        return Batch(
            to_device(self._tokens[indices], self._device),
            to_device(self._target[indices], self._device),
            None if self._inputs is None else to_device(self._inputs[indices], self._device),
        )


class Objective:
    """Loss of a stage, and the optimizer of the parameters that lower it.

    Args:
        settings: settings of the gradient descent.
        problem: the text, and the model with the stage's masked linears or trained weights.
        stage: the stage.
        learner: the stage's learner.
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
        self.count = len(problem.tokens)
        self.steps = settings.steps_for(self.count)
        # The fused optimizer has no temporaries of the size of all parameters.
        self.optimizer = torch.optim.AdamW(
            learner.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        # In float16 the gradients of a mean over tokens would vanish. The scaler skips a step whose
        # gradients overflow.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=next(problem.model.parameters()).dtype == torch.float16
        )
        self._placement = placement_of(problem.model)
        tokens = self.steps * settings.batch_size * problem.tokens.shape[1]
        self._distance = loss_named(str(settings.loss), problem.model, tokens, settings.compile)
        self._samples = Batches(problem.tokens, stage.target, stage.inputs, self.device)
        # Arguments of the layers that batches share, by the number of windows.
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        # Backward would otherwise hold the weights of all layers. None: the first step decides.
        self._recomputes = True if self._placement.streams else settings.activation_checkpointing

    def backward(self, batch: Tensor, after: Tensor | None = None) -> Tensor:
        """Compute the gradients of this rank's portions of a batch; return their part of the loss.

        Args:
            batch: int64 `(windows,)`; the loss is the mean over all of them.
            after: the next batch, which is fetched while the device computes; None: no next batch.
        """
        at_once = self.settings.micro_batch_size
        portions = parallel.portions(batch, at_once)
        following = [] if after is None else parallel.portions(after, at_once)
        total = torch.zeros((), device=self.device)
        for number, (portion, counted) in enumerate(portions):
            loss = self._loss(portion) * (counted / len(batch))
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
            if number + 1 < len(portions):
                next_portion, _ = portions[number + 1]
                self._samples.fetch(next_portion)
            elif following:
                next_portion, _ = following[0]
                self._samples.fetch(next_portion)
        self.learner.collect()
        return total

    @torch.no_grad()
    def mean(self) -> float:
        """Return the loss of the present result, mean over all windows."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        at_once = self.problem.calibration_batch_size
        for batch, counted in parallel.portions(torch.arange(self.count), at_once):
            total += self._loss(batch).double() * counted
        parallel.all_reduce([total])
        return float(total) / self.count

    @torch.no_grad()
    def broken(self, indices: Tensor) -> str:
        """Name the first layer whose output is not finite for some windows, alike in all ranks."""
        for batch in indices.split(self.problem.calibration_batch_size):
            hidden, kwargs = self._inputs(self._samples.take(batch))
            broken_layer = None
            for index in self.stage.layers:  # all layers, because all ranks enter each
                hidden = self._layer(index, hidden, kwargs[index])
                if broken_layer is None and not bool(hidden.isfinite().all()):
                    broken_layer = index
            if broken_layer is not None:
                return f"the loss is not finite: the output of decoder layer {broken_layer} is not"
        return "the loss is not finite, although the output of every layer is"

    def _loss(self, indices: Tensor) -> Tensor:
        """Return the loss of the windows at `indices`, mean over tokens."""
        batch = self._samples.take(indices)
        hidden, kwargs = self._inputs(batch)
        recompute = torch.is_grad_enabled() and self._recompute(hidden)
        layer = partial(recomputed, self._layer) if recompute else self._layer
        for index in self.stage.layers:
            hidden = layer(index, hidden, kwargs[index])
        return self._distance(hidden, batch.target)

    def _layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run a decoder layer as the learner sets it; backward may run it again."""
        self.learner.set_layer(index)
        with self._placement.layer(index) as layer:
            return run_layer(layer, hidden, kwargs)

    def _inputs(self, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the input of the stage's first layer, and the keyword arguments of all layers."""
        samples = len(batch.tokens)
        if batch.inputs is not None and samples in self._kwargs:
            return batch.inputs, self._kwargs[samples]
        hidden, kwargs = layer_inputs(self.problem.model, batch.tokens)
        if not arguments_depend_on_tokens(self.problem.model):
            self._kwargs[samples] = kwargs
        return (hidden if batch.inputs is None else batch.inputs), kwargs

    def _recompute(self, hidden: Tensor) -> bool:
        """Tell whether backward recomputes each layer."""
        if self._recomputes is None:
            width = hidden.shape[-1]
            item = hidden.element_size()
            a_token = kept_a_token(self.problem.groups, width, item, self.learner.gathers)
            activations = hidden.numel() // width * a_token * item * len(self.stage.layers)
            allowed = KEPT_ON_A_HOST
            if self.device.type == "cuda":
                free = free_memory(self.device) - self._not_yet_taken(hidden)
                allowed = _SHARE_OF_FREE * free
            self._recomputes = activations > allowed
        return self._recomputes

    def _not_yet_taken(self, hidden: Tensor) -> float:
        """Return the bytes that a step will allocate for other purposes than activations."""
        size = sum(values.numel() * values.element_size() for values in self.learner.parameters())
        moments = 0 if self.optimizer.state else 2  # a checkpoint has loaded them
        # The rounded copy of a trained weight stays in memory until backward.
        product = product_dtype(hidden)
        rounded = sum(
            weight.numel() * product.itemsize
            for weight in self.problem.model.parameters()
            if weight.requires_grad and weight.dtype != product
        )
        return size * (1 + moments) + rounded + self.learner.masked_weights * product.itemsize


def kept_a_token(
    groups: Sequence[ChannelGroup], hidden: int, item: int, gathers: bool = False
) -> int:
    """Return the number of values that a decoder layer keeps for backward, for each token.

    They are 11 vectors of the residual stream and 4 of the MLP.

    Args:
        groups: channel groups of the model.
        hidden: width of the residual stream.
        item: bytes of a value.
        gathers: each linear keeps its own permuted inputs, instead of one tensor for a group. In
            float32 the 15 vectors include these copies. In half precision they do not, because the
            norms compute in float32.
    """
    inner = max(
        (group.channels for group in groups if group.table.producers and not group.table.by_head),
        default=hidden,
    )
    copies = 0
    if gathers and item < 4:
        layers = len({group.layer for group in groups})
        copies = sum(group.channels * (len(group.members) - 1) for group in groups) // layers
    return 11 * hidden + 4 * inner + copies
