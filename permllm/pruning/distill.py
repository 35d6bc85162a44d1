"""Distillation of the dense model into the kept weights of the pruned one, end to end."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import decoder_layers
from permllm.pruning.admm import ADMM
from permllm.pruning.obs import OBS
from permllm.pruning.reconstruction import (
    NoReconstruction,
    PrunedLinear,
    PrunedNetwork,
    Reconstruction,
)
from permllm.runs.files import DISTILL_CHECKPOINT
from permllm.runtime.values import SETTINGS, Count, Positive, Whole
from permllm.sparsity.statistics import Statistics
from permllm.training.checkpoint import read_checkpoint
from permllm.training.learner import Learner, Moment, Window
from permllm.training.loop import Training
from permllm.training.settings import DescentSettings, LearningSettings, Loss


@dataclass(kw_only=True, config=SETTINGS)
class Distill(DescentSettings, Reconstruction):
    """Adam on all kept weights towards the dense model's next-token distributions, by the loop that everything learns in.

    Holds the weights and `KeptWeights` with its moments.
    """

    learned = True
    learning_rate: Positive = 1e-4
    epochs: Count = 2
    skip: Whole = 0
    start: Literal["masked", "obs", "admm"] = "masked"
    loss: ClassVar[Loss] = "kl"  # type: ignore[misc]

    @property
    def statistics(self) -> Statistics:  # type: ignore[override]
        """Return the statistics of the reconstruction that the weights start from."""
        return self._before.statistics

    @property
    def _before(self) -> Reconstruction:
        return {"masked": NoReconstruction, "obs": OBS, "admm": ADMM}[self.start]()

    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the weight that learning starts from."""
        return self._before.linear(pruned)

    def network(self, pruned: PrunedNetwork) -> None:
        """Train the linears in place, from the latest checkpoint.

        Raises TrainingError when the loss is not finite.
        """
        problem = pruned.problem
        settings = LearningSettings.of(self, loss=self.loss, select_from=0)
        kept = KeptWeights(pruned.linears, pruned.masks)
        learner = WeightLearner(kept, self.learning_rate)
        window = Window(0, 0, len(decoder_layers(problem.model)), None, problem.target)
        with kept.gradients():
            state = read_checkpoint(problem, DISTILL_CHECKPOINT)
            history = [] if state is None else list(state["history"])
            problem.on_resume(list(history))
            training = Training(
                settings, problem, window, learner, "distill", DISTILL_CHECKPOINT, history
            )
            if state is not None:
                training.restore(state)
            del state  # which is as large as the weights
            training.run()


class KeptWeights:
    """Values under the masks, `(kept,)` for each linear, and their gradients, which arrive in backward.

    Of float32 weights, half of them kept, these and Adam's two moments are 10 bytes a weight, with
    their places. The gradient of one linear at a time is whole.

    Args:
        linears: whose weights are trained. Half-precision weights are trained as float32 copies, or
            small steps would be rounded away.
        masks: bool `(C_out, C_in)` for each of them.

    Attributes:
        weights: of the linears.
        values: to be optimized; `write` puts them into the weights.
    """

    def __init__(self, linears: Sequence[nn.Linear], masks: Collection[Tensor]) -> None:
        self.weights: list[Tensor] = [linear.weight for linear in linears]
        places = (mask.flatten().nonzero().flatten().to(torch.int32) for mask in masks)
        self._places = [
            place.to(weight.device) for place, weight in zip(places, self.weights, strict=True)
        ]
        kept = (self._kept(number, weight.detach()) for number, weight in enumerate(self.weights))
        self.values = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in kept]

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Give the values the gradients of the weights, which have none of their own."""
        with ExitStack() as hooks:
            for number, weight in enumerate(self.weights):
                weight.requires_grad_(True)
                hooks.callback(weight.requires_grad_, False)
                hooks.enter_context(
                    weight.register_post_accumulate_grad_hook(partial(self._take, number))
                )
            yield

    @torch.no_grad()
    def write(self) -> None:
        """Write the values into the weights."""
        for number, (weight, value) in enumerate(zip(self.weights, self.values, strict=True)):
            weight.put_(self._places[number].long(), value.to(weight.dtype))

    def _take(self, number: int, weight: Tensor) -> None:
        assert weight.grad is not None
        value = self.values[number]
        gradient = self._kept(number, weight.grad).to(value.dtype)
        value.grad = gradient if value.grad is None else value.grad.add_(gradient)
        weight.grad = None

    def _kept(self, number: int, tensor: Tensor) -> Tensor:
        """Return the entries of a tensor `(C_out, C_in)` that the mask keeps, `(kept,)`."""
        return tensor.take(self._places[number].long())


class WeightLearner(Learner):
    """Learner of kept weights, which the model's own linears hold.

    Args:
        kept: the weights.
        learning_rate: at the start.
    """

    def __init__(self, kept: KeptWeights, learning_rate: float) -> None:
        self.kept = kept
        self.learning_rate = learning_rate

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": self.kept.values, "lr": self.learning_rate}]

    @override
    def begin(self, moment: Moment) -> None:
        self.kept.write()

    @override
    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        return {"weights_learned": sum(value.numel() for value in self.kept.values)}

    @override
    def keep(self) -> None:
        """Nothing: the last weights are the result."""

    @override
    def state(self) -> dict[str, Any]:
        return {"values": self.kept.values}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        for value, found in zip(self.kept.values, state["values"], strict=True):
            value.copy_(found)
        self.kept.write()
