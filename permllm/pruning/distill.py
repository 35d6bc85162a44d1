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
from permllm.pruning.reconstruction import (
    NoReconstruction,
    PrunedLinear,
    PrunedNetwork,
    Reconstruction,
)
from permllm.pruning.sparsegpt import OBS
from permllm.runs.files import DISTILL_CHECKPOINT
from permllm.runtime.values import SETTINGS, Count, Positive, Whole
from permllm.sparsity.statistics import Statistics
from permllm.training.learner import Learner, Moment, Window
from permllm.training.settings import DescentSettings, LearningSettings, Loss
from permllm.training.stages import Course


@dataclass(kw_only=True, config=SETTINGS)
class Distill(DescentSettings, Reconstruction):
    """Adam on all kept weights towards the dense model's next-token distributions."""

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

    @override
    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the weight that learning starts from."""
        return self._before.linear(pruned)

    @override
    def network(self, pruned: PrunedNetwork) -> None:
        """Train the linears in place, from the latest checkpoint."""
        problem = pruned.problem
        settings = LearningSettings.of(self, loss=self.loss, select_from=0)
        weights = KeptWeights(pruned.linears, pruned.masks, self.learning_rate)
        window = Window(0, 0, len(decoder_layers(problem.model)), None, problem.target)
        with weights.gradients():
            course = Course(settings, problem, "distill", DISTILL_CHECKPOINT)
            course.train(window, weights)


class KeptWeights(Learner):
    """Learner of the values under masks, `(kept,)` for each linear.

    Of float32 weights, half of them kept, these and Adam's two moments are 10 bytes a weight, with
    their places. Gradients arrive in backward, where that of one linear at a time is whole.

    Args:
        linears: whose weights are trained. Half-precision weights are trained as float32 copies, or
            small steps would be rounded away.
        masks: bool `(C_out, C_in)` for each of them.
        learning_rate: at the start.

    Attributes:
        values: to be optimized; `begin` writes them into the weights.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], masks: Collection[Tensor], learning_rate: float
    ) -> None:
        self._learning_rate = learning_rate
        self._weights: list[Tensor] = [linear.weight for linear in linears]
        self._places, self.values = [], []
        for weight, mask in zip(self._weights, masks, strict=True):
            places = mask.flatten().nonzero().flatten().to(weight.device, torch.int32)
            kept = weight.detach().take(places.long())
            self._places.append(places)
            self.values.append(kept.to(torch.promote_types(kept.dtype, torch.float32)))

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Give the values the gradients of the weights, which have none of their own."""
        with ExitStack() as hooks:
            for number, weight in enumerate(self._weights):
                weight.requires_grad_(True)
                hooks.callback(weight.requires_grad_, False)
                hook = partial(self._take, number)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(hook))
            yield

    def _take(self, number: int, weight: Tensor) -> None:
        assert weight.grad is not None
        value, places = self.values[number], self._places[number]
        gradient = weight.grad.take(places.long()).to(value.dtype)
        value.grad = gradient if value.grad is None else value.grad.add_(gradient)
        weight.grad = None

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": self.values, "lr": self._learning_rate}]

    @override
    @torch.no_grad()
    def begin(self, moment: Moment | None) -> None:
        for weight, places, value in zip(self._weights, self._places, self.values, strict=True):
            weight.put_(places.long(), value.to(weight.dtype))

    @override
    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        return {"weights_learned": sum(value.numel() for value in self.values)}

    @override
    def keep(self) -> None:
        """Keep nothing: the last weights are the result."""

    @override
    def state(self) -> dict[str, Any]:
        return {"values": self.values}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        for value, found in zip(self.values, state["values"], strict=True):
            value.copy_(found)
        self.begin(None)
