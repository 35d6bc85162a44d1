"""Distillation of the dense model into the kept weights of the pruned model, end to end."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import decoder_layers
from permllm.reconstruction.admm import ADMM
from permllm.reconstruction.moving import MovingWeights
from permllm.reconstruction.base import PrunedLinear, PrunedNetwork, Reconstruction
from permllm.reconstruction.obs import OBS
from permllm.settings.learning import DescentSettings, LearningSettings, Loss
from permllm.settings.values import SETTINGS, Whole
from permllm.sparsity.statistics import Statistics
from permllm.store.files import DISTILL_CHECKPOINT
from permllm.training.learner import Learner, Progress, Stage
from permllm.training.trainer import StageSchedule

# Reconstructions of single linears before learning, with the usual settings.
_STARTS = {
    "masked": Reconstruction(),
    "obs": OBS(damping=0.01),
    "admm": ADMM(iterations=12, damping=0.01),
}


@dataclass(kw_only=True, config=SETTINGS)
class Distill(DescentSettings, Reconstruction):
    """Gradient descent of all kept weights to the dense model's next-token distributions."""

    learned = True
    relative: bool
    skip: Whole
    start: Literal["masked", "obs", "admm"]
    loss: ClassVar[Loss] = "kl"  # type: ignore[misc]
    moving: Literal["none", "ast", "elsa"] = "none"
    refresh: int = 10
    decay: float = 0.0
    pruned_start: float = 0.7
    penalty: float = 0.01
    dual_every: int = 32
    warmup: float = 0.0
    beta2: float = 0.999
    floor: float = 0.0
    cross_entropy: float = 0.0
    train_head: bool = False

    @property
    def statistics(self) -> Statistics:  # type: ignore[override]
        """Return the statistics that the reconstruction at the start needs."""
        return _STARTS[self.start].statistics

    @property
    def iterations(self) -> int:  # type: ignore[override]
        """Return the iterations of the reconstruction at the start."""
        return _STARTS[self.start].iterations

    @override
    def linear(self, pruned: PrunedLinear) -> Tensor:
        """Return the weight at the start of learning."""
        return _STARTS[self.start].linear(pruned)

    @override
    def network(self, pruned: PrunedNetwork) -> None:
        """Train the weights in place, from the last checkpoint on."""
        problem = pruned.problem
        mine = {field.name: getattr(self, field.name) for field in fields(DescentSettings)}
        settings = LearningSettings(
            **mine,
            weight_decay=0.0,
            loss=self.loss,
            layers_per_stage="all",
            last_layers=None,
            select_from=0,
            compile=None,
        )
        object.__setattr__(settings, "warmup", self.warmup)
        object.__setattr__(settings, "floor", self.floor)
        object.__setattr__(settings, "beta2", self.beta2)
        problem.cross_entropy = self.cross_entropy
        problem.train_head = self.train_head
        problem.dense_head = problem.model.get_output_embeddings().weight.detach().clone()
        stage = Stage(0, range(len(decoder_layers(problem.model))), None, problem.target)
        if self.moving == "none":
            weights = KeptWeights(pruned.linears, pruned.masks, self.relative)
            if self.train_head:
                weights.add_head(problem.model)
        else:
            group_of = {path: group.name for group in problem.groups for path in group.members}
            weights = MovingWeights(
                self.moving,
                pruned.paths,
                pruned.linears,
                list(pruned.masks),
                [pruned.permutations[group_of[path]] for path in pruned.paths],
                [problem.factors_of(path) for path in pruned.paths],
                problem.pattern,
                self,
            )
        with weights.gradients():
            StageSchedule(settings, problem, "distill", DISTILL_CHECKPOINT).train(stage, weights)
        if self.moving != "none":
            masks = weights.finish()
            before = list(pruned.masks)
            moved = sum(int((a ^ b).sum()) for a, b in zip(before, masks))
            total = sum(a.numel() for a in masks)
            print(f"moved from the start: {moved / total:.4f}", flush=True)
            pruned.replace(masks)


class KeptWeights(Learner):
    """Learner of the kept weights, as a vector `(kept,)` for each linear.

    The vectors, their gradients, Adam's two moments and the positions of the kept weights take 10
    bytes for each weight at 2:4. Backward holds the gradient of one whole weight at a time.

    Args:
        linears: linears whose weights are trained. Half-precision weights are trained as float32
            copies, because half precision would round small steps to zero.
        masks: bool `(C_out, C_in)` for each linear.
        relative: the vectors are in units of their root mean square, so that a step of AdamW
            changes each linear by the same share.

    Attributes:
        values: the vectors; `begin` writes them into the weights.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], masks: Collection[Tensor], relative: bool = False
    ) -> None:
        self._weights: list[Tensor] = [linear.weight for linear in linears]
        self._places: list[Tensor] = []
        self._units: list[float] = []
        self.values: list[Tensor] = []
        for weight, mask in zip(self._weights, masks, strict=True):
            places = mask.flatten().nonzero().flatten().to(weight.device, torch.int32)
            value = weight.detach().take(places.long())
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            unit = (value.square().mean().sqrt().item() or 1.0) if relative else 1.0
            self._places.append(places)
            self._units.append(unit)
            self.values.append(value.div_(unit))

    def add_head(self, model: nn.Module) -> None:
        weight = model.get_output_embeddings().weight
        self._weights.append(weight)
        self._places.append(torch.arange(weight.numel(), dtype=torch.int32))
        value = weight.detach().flatten().clone()
        unit = value.square().mean().sqrt().item()
        self._units.append(unit)
        self.values.append(value.div_(unit))

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Move the gradients of the weights to the values, while the context is open."""
        with ExitStack() as hooks:
            for number, weight in enumerate(self._weights):
                weight.requires_grad_(True)
                hooks.callback(weight.requires_grad_, False)
                hook = partial(self._take, number)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(hook))
            yield

    def _take(self, number: int, weight: Tensor) -> None:
        assert weight.grad is not None
        value = self.values[number]
        places = self._places[number]
        gradient = weight.grad.take(places.long()).to(value.dtype).mul_(self._units[number])
        value.grad = gradient if value.grad is None else value.grad.add_(gradient)
        weight.grad = None

    @override
    def parameters(self) -> list[Tensor]:
        return self.values

    @override
    @torch.no_grad()
    def begin(self, progress: Progress | None) -> None:
        """Write the values into the weights."""
        for number, weight in enumerate(self._weights):
            value = (self.values[number] * self._units[number]).to(weight.dtype)
            # `put_` has no deterministic version.
            weight.view(-1).index_copy_(0, self._places[number].long(), value)

    @override
    def epoch_values(self, progress: Progress) -> dict[str, Any]:
        """Return the number of kept weights."""
        return {"weights_learned": sum(value.numel() for value in self.values)}

    @override
    def state(self) -> dict[str, Any]:
        return {"values": self.values}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
        self.begin(None)
