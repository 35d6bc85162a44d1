"""Masks by a score for each weight, which learn stage by stage under given permutations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import override

from permllm.mask.base import LearnedMask
from permllm.mask.score_linear import ScoreLinear, Scores, log_saliency_t
from permllm.models.families import ChannelGroup, linear_at
from permllm.models.offload import placement_of
from permllm.settings.config import NMPattern, RunConfig
from permllm.settings.learning import LearningPlan, LearningSettings
from permllm.settings.values import SETTINGS
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import SaliencyFactors
from permllm.store.files import MASK_CHECKPOINT
from permllm.store.tensors import PackedMasks, packed_mask, unpacked_mask
from permllm.training.kernels import chosen_kernels
from permllm.training.learner import Learner, Progress, Stage, on_cpu
from permllm.training.problem import LearningProblem, replaced_linears
from permllm.training.trainer import StageSchedule


class FreeScores(Scores):
    """Score for each weight, `(C_in, C_out)`, that starts at the logarithm of the saliency."""

    keeps_masked = True

    def __init__(self, weight: Tensor, factors: SaliencyFactors) -> None:
        super().__init__()
        # Contiguous, because chunks of channels are read and `all_reduce` needs contiguous
        # gradients.
        self.free = nn.Parameter(log_saliency_t(weight.t(), factors).contiguous())

    @override
    def chunk_scores(self, weight_t: Tensor, channels: slice) -> SaliencyFactors:
        """Return the scores."""
        return SaliencyFactors(0, self.free.data[channels].t())

    @override
    def parameter_gradients(self, score_gradient: Tensor) -> list[Tensor]:
        """Return the gradients of the scores."""
        return [score_gradient]


class MaskLearner(Learner):
    """Learner of the masks in a stage.

    Args:
        linears: masked linears of the stage by path.
        earlier: masks of the earlier stages, like `best`.

    Attributes:
        best: masks by linear, packed by `packed_mask`, in original channel order, on the CPU.
    """

    def __init__(
        self,
        problem: LearningProblem,
        groups: Sequence[ChannelGroup],
        linears: Mapping[str, ScoreLinear],
        earlier: Mapping[str, Tensor],
    ) -> None:
        self._placement = placement_of(problem.model)
        self.groups = groups
        self.linears = linears
        self.earlier = dict(earlier)
        self.best: dict[str, Tensor] = {}
        self._at_epoch = self.present()  # masks at the end of the last epoch
        self.gathers = any(linear.permutation is not None for linear in linears.values())
        self.masked_weights = sum(
            linear.linear.weight.numel()
            for linear in linears.values()
            if linear.scores.keeps_masked
        )
        self.scores = nn.ModuleDict(
            {path.replace(".", "/"): linear.scores for path, linear in linears.items()}
        )

    @override
    def parameters(self) -> list[Tensor]:
        return list(self.scores.parameters())

    @torch.no_grad()
    def present(self) -> dict[str, Tensor]:
        """Return the masks of the present scores, like `best`."""
        packed: dict[str, Tensor] = {}
        for group in self.groups:
            with self._placement.layer(group.layer):
                for path in group.members:
                    packed[path] = packed_mask(self.linears[path].mask().cpu())
        return packed

    @override
    def epoch_values(self, progress: Progress) -> dict[str, Any]:
        """Return the share of mask entries that changed in the epoch."""
        present = self.present()
        changed = 0
        for path, before in self._at_epoch.items():
            differing = present[path] ^ before
            changed += int(unpacked_mask(differing, [8 * len(differing)]).sum())
        self._at_epoch = present
        return {"mask_flips": changed / sum(8 * len(bits) for bits in present.values())}

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
        self.best = on_cpu(state["best"])
        self._at_epoch = on_cpu(state["at_epoch"])


@dataclass(kw_only=True, config=SETTINGS)
class ScoreMask(LearningSettings, LearnedMask):
    """Masks by a score for each weight, which takes 18 or 20 bytes for each weight in a stage.

    The scores start at the logarithm of the pruner's saliency.
    """

    kind: ClassVar[Any] = FreeScores
    linear: ClassVar[type[ScoreLinear]] = ScoreLinear

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        """Raise ConfigError if no group is pruned in the layers that learn."""
        self.check_last_layers("mask", groups, layers)

    def scores(
        self,
        weight: Tensor,
        factors: SaliencyFactors,
        pattern: NMPattern,
        generator: torch.Generator,
    ) -> Any:
        """Return the scores of a linear at the start, which choose the pruner's mask."""
        return FreeScores(weight, factors)

    def learner(self, *stage: Any) -> MaskLearner:
        """Return the learner of a stage; the arguments are those of `MaskLearner`."""
        return MaskLearner(*stage)

    def count(self, group: ChannelGroup, pattern: NMPattern) -> int:
        """Return the number of parameters of a group's linears."""
        return group.channels * sum(group.rows)

    @override
    def plan(self, groups: list[ChannelGroup], layers: int, pattern: NMPattern) -> LearningPlan:
        """Return the plan; each layer counts as the layer with most parameters."""
        of_layers = Counter[int]()
        for group in groups:
            of_layers[group.layer] += self.count(group, pattern)
        spans = self.spans(layers)
        parameters = max(of_layers.values()) * sum(map(len, spans))
        return LearningPlan(spans, parameters, self.kind.keeps_masked)

    @override
    def masks(self, problem: LearningProblem, permutations: Mapping[str, Tensor]) -> PackedMasks:
        """Learn the masks of all linears, stage by stage."""
        schedule = StageSchedule(self, problem, "mask", MASK_CHECKPOINT)
        permutations = {
            name: permutation.to(problem.device) for name, permutation in permutations.items()
        }
        packed: dict[str, Tensor] = {}
        if schedule.state is not None:
            packed = on_cpu(schedule.state["learner"]["earlier"])

        def mask_of(group: ChannelGroup, path: str) -> Tensor:
            if path in packed:
                return unpacked_mask(packed[path], linear_at(problem.model, path).weight.shape)
            saliency = problem.saliency_of(path)
            return permuted_nm_mask(saliency, permutations[group.name], problem.pattern)

        pruned = {group.layer for group in problem.groups}
        for stage in schedule.stages(lambda span: not pruned.isdisjoint(span), mask_of):
            groups = [group for group in problem.groups if group.layer in stage.layers]
            with self.masked_linears(problem, groups, permutations, stage) as linears:
                learner = self.learner(problem, groups, linears, packed)
                schedule.train(stage, learner)
                packed |= learner.best
                del linears, learner  # frees their memory before the next stage
        return PackedMasks(
            (path, mask_of(group, path).cpu()) for group in problem.groups for path in group.members
        )

    def masked_linears(
        self,
        problem: LearningProblem,
        groups: list[ChannelGroup],
        permutations: Mapping[str, Tensor],
        stage: Stage,
    ) -> AbstractContextManager[dict[str, ScoreLinear]]:
        """Replace the linears of a stage by masked linears, with permuted weights, in a context."""
        kernels = chosen_kernels(self, problem, groups)
        generator = torch.Generator().manual_seed(problem.seed + 1 + stage.number)

        def permuted(group: ChannelGroup, weight: Tensor) -> Tensor:
            return weight.t()[permutations[group.name]].t()

        def original(group: ChannelGroup, weight: Tensor) -> Tensor:
            return weight.t()[permutations[group.name].argsort()].t().contiguous()

        def masked_linear(group: ChannelGroup, path: str, linear: nn.Linear) -> ScoreLinear:
            permutation = permutations[group.name]
            factors = problem.factors_of(path).permuted(permutation)
            weight = permuted(group, linear.weight.data)
            scores = self.scores(weight, factors, problem.pattern, generator)
            identity = torch.equal(
                permutation, torch.arange(len(permutation), device=permutation.device)
            )
            moved = None if identity else permutation
            return self.linear(linear, scores, problem.pattern, moved, kernels)

        return replaced_linears(problem.model, groups, masked_linear, permuted, original)
