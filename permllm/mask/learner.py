"""The masks of a window as they learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.models.offload import placement_of
from permllm.runs.masks import packed_mask, unpacked_mask
from permllm.training.learner import Learner, Moment
from permllm.training.masked_linear import MaskedLinear
from permllm.training.problem import LearningProblem


class MaskLearner(Learner):
    """The masks of a window, in orders that it is given.

    Args:
        problem: whose model's linears in the window are masked linears now.
        groups: of the window.
        linears: masked linears by group, whose scores learn.
        learning_rate: of the scores.
        earlier: masks of the windows before, like `best`.

    Attributes:
        best: masks by linear, original channel order, on the CPU, as `packed_mask` gives them.
    """

    def __init__(
        self,
        problem: LearningProblem,
        groups: Sequence[ChannelGroup],
        linears: Mapping[str, Sequence[MaskedLinear]],
        learning_rate: float,
        earlier: Mapping[str, Tensor],
    ) -> None:
        self._placement = placement_of(problem.model)
        self.groups = groups
        self.linears = {
            path: linear for group in groups for path, linear in zip(group.members, linears[group.name], strict=True)
        }
        self.earlier = dict(earlier)
        self.learning_rate = learning_rate
        self.best: dict[str, Tensor] = {}
        self._at_epoch: dict[str, Tensor] = {}
        self.scores = nn.ModuleDict({path.replace(".", "/"): linear.scores for path, linear in self.linears.items()})

    @property
    @override
    def gathers(self) -> bool:
        return any(linear.order is not None for linear in self.linears.values())

    @override
    def masked_weights(self) -> int:
        return sum(linear.linear.weight.numel() for linear in self.linears.values() if linear.scores.keeps_masked)

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.scores.parameters()), "lr": self.learning_rate}]

    @torch.no_grad()
    def present(self) -> dict[str, Tensor]:
        """The masks as they are now, like `best`."""
        found: dict[str, Tensor] = {}
        for group in self.groups:
            with self._placement.layer(group.layer):
                found |= {path: packed_mask(self.linears[path].mask().cpu()) for path in group.members}
        return found

    @override
    def begin_epoch(self) -> None:
        self._at_epoch = self.present()

    @override
    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        now = self.present()
        changed = sum(int(unpacked_mask(now[path] ^ before).sum()) for path, before in self._at_epoch.items())
        return {"mask_flips": changed / sum(8 * len(bits) for bits in now.values())}

    @override
    def keep(self) -> None:
        self.best = self.present()

    @override
    def state(self) -> dict[str, Any]:
        masks = {"best": self.best, "at_epoch": self._at_epoch, "earlier": self.earlier}
        return {"scores": self.scores.state_dict()} | masks

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state["scores"])
        self.best = {path: bits.cpu() for path, bits in state["best"].items()}
        self._at_epoch = {path: bits.cpu() for path, bits in state["at_epoch"].items()}
