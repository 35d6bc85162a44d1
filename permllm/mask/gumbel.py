"""Masks by a distribution over the N:M candidates of each group, which learns (MaskLLM).

Each group of M weights has K = C(M, N) candidates s_k in {0, 1}^M with N ones, and a gate p_k for
each of them. In a step every forward multiplies by a soft mask,

    y = softmax((kappa p + g) / tau)        m = sum_k y_k s_k        g: Gumbel noise

with a temperature tau that falls and a scale kappa that rises. The result is the candidate with the
largest gate. The recipe is that of arXiv 2409.17481, made from its formulas. The patent application
US 2025-0335769 A1 belongs to it.
"""

import random
from itertools import combinations
from math import comb
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import override

from permllm.errors import ConfigError
from permllm.mask.score import MaskLearner, ScoreMask
from permllm.mask.score_linear import ScoreLinear, Scores
from permllm.models.families import ChannelGroup
from permllm.runtime.precision import products_as_they_are
from permllm.settings.config import NMPattern, RunConfig
from permllm.settings.values import SETTINGS, Amount
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.saliency import SaliencyFactors, saliency
from permllm.training.learner import Progress
from permllm.training.problem import LearningProblem

# Largest number of candidates: that of 4:8.
_CANDIDATES = 70
# Standard deviation of the gates at the start, and how much the pruner's mask raises them.
_STD = 0.01
_PRIOR = 3 * _STD


class Gates(Scores):
    """Gates of a linear, which start near the pruner's mask.

    Attributes:
        gates: `(K, C_in / M, C_out)`.
        candidates: `(K, M)`, zeros and ones.
        norm: `||W||^2`.
        temperature, scale: tau and kappa of the present step.
        noise_seed: seed of the noise of the present step.
    """

    keeps_masked = True
    measures_energy = True
    temperature: float
    scale: float
    noise_seed: int

    def __init__(
        self,
        weight: Tensor,
        factors: SaliencyFactors,
        pattern: NMPattern,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.norm = float(weight.to(factors.column.dtype).square().sum())
        places = torch.tensor(list(combinations(range(pattern.m), pattern.n)))
        candidates = torch.zeros(len(places), pattern.m).scatter_(1, places, 1.0)
        self.candidates = candidates.to(factors.column)
        prior = nm_mask(saliency(weight, factors), pattern).t().unflatten(0, (-1, pattern.m))
        agreement = _sums("km,gmr->kgr", self.candidates, prior.to(self.candidates.dtype))
        noise = torch.randn(agreement.shape, generator=generator).to(agreement)
        centred = agreement - pattern.n**2 / pattern.m
        self.gates = nn.Parameter(noise.mul_(_STD).add_(centred, alpha=_PRIOR))

    def soft(self) -> Tensor:
        """Return y of the present step, `(K, C_in / M, C_out)`, each time with the same noise."""
        generator = torch.Generator(self.gates.device).manual_seed(self.noise_seed)
        # By two logarithms, because drawing exponential numbers takes a CPU six times as long.
        noise = torch.empty_like(self.gates).uniform_(generator=generator)
        noise.log_().neg_().log_().neg_()
        return noise.add_(self.gates, alpha=self.scale).div_(self.temperature).softmax(0)

    def best(self) -> Tensor:
        """Return 1 for the largest gate of each group, and 0 for the others, shaped like y."""
        largest = self.gates.argmax(0, keepdim=True)
        return torch.zeros_like(self.gates).scatter_(0, largest, 1.0)

    def mask_t(self, y: Tensor) -> Tensor:
        """Return `sum_k y_k s_k`, `(C_in, C_out)`."""
        return _sums("km,kgr->gmr", self.candidates, y).flatten(0, 1)

    @override
    def chunk_scores(self, weight_t: Tensor, channels: slice) -> SaliencyFactors:
        """Return the mask of the largest gates as scores."""
        return SaliencyFactors(0, self.mask_t(self.best())[channels].t())

    @override
    def parameter_gradients(self, score_gradient: Tensor) -> list[Tensor]:
        """Return the gradient of the gates from that of the mask, up to a constant for each group.

        All candidates have N ones, so that a constant does not change the gradient.
        """
        y = self.soft()
        places = score_gradient.unflatten(0, (-1, self.candidates.shape[1]))
        of_y = _sums("km,gmr->kgr", self.candidates, places)
        of_y -= (of_y * y).sum(0)
        return [of_y.mul_(y).mul_(self.scale / self.temperature)]


def _sums(indices: str, candidates: Tensor, values: Tensor) -> Tensor:
    """Return sums of the values of candidates or places, which must not be rounded."""
    with products_as_they_are(values):
        return torch.einsum(indices, candidates, values)


class GumbelLinear(ScoreLinear):
    """Linear with a soft mask if gradients are computed, and otherwise with the resulting one."""

    _is_soft: bool

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., C_in)`, in the original channel order, to `(..., C_out)`."""
        self._is_soft = torch.is_grad_enabled()
        return super().forward(x)

    @override
    @torch.no_grad()
    def masked_weight_t(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `(W * m)^T (C_in, C_out)`, permuted."""
        gates: Any = self.scores
        y = gates.soft() if self._is_soft else gates.best()
        return gates.mask_t(y).mul_(weight.t()).to(dtype)


class GumbelLearner(MaskLearner):
    """Learner of the gates in a stage; `regularization` is c of its penalty."""

    def __init__(self, regularization: float, problem: LearningProblem, *stage: Any) -> None:
        super().__init__(problem, *stage)
        self._seed = problem.seed
        gates: Any = [linear.scores for linear in self.linears.values()]
        self._regularization = regularization / sum(part.norm for part in gates)
        self._factor = 0.0

    @override
    def begin(self, progress: Progress) -> None:
        """Set temperature, scale and noise of a step."""
        share = progress.step / progress.steps
        self._factor = self._regularization * (1 - share)
        for path, linear in self.linears.items():
            gates: Any = linear.scores
            gates.temperature = 4.0 - 3.95 * share
            gates.scale = 100.0 + 400.0 * share
            gates.noise_seed = random.Random(f"{self._seed} {progress.step} {path}").getrandbits(63)

    @override
    def penalty(self) -> Tensor | float:
        """Return `-c (1 - t / T) sum ||W m||^2 / sum ||W||^2` at step t of T, over all linears."""
        energy = sum(linear.energy for linear in self.linears.values())
        return -self._factor * energy


@dataclass(kw_only=True, config=SETTINGS)
class GumbelMask(ScoreMask):
    """Masks by a distribution over the candidates of each group: 26 or 28 bytes a weight at 2:4."""

    regularization: Amount

    kind = Gates
    linear = GumbelLinear
    betas = (0.9, 0.95)
    eps = 1e-5
    clip = 1.0
    last_rate = 0.1

    @override
    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError if groups have too many candidates."""
        count = comb(config.pattern.m, config.pattern.n)
        if count > _CANDIDATES:
            raise ConfigError(
                f"sparsity={config.pattern} has {count} candidates for each group; mask=gumbel "
                f"takes at most {_CANDIDATES}"
            )

    @override
    def scores(
        self,
        weight: Tensor,
        factors: SaliencyFactors,
        pattern: NMPattern,
        generator: torch.Generator,
    ) -> Scores:
        """Return the gates of a linear at the start."""
        return Gates(weight, factors, pattern, generator)

    @override
    def learner(self, *stage: Any) -> MaskLearner:
        """Return the learner of a stage."""
        return GumbelLearner(self.regularization, *stage)

    @override
    def count(self, group: ChannelGroup, pattern: NMPattern) -> int:
        """Return the number of gates of a group's linears."""
        return group.channels // pattern.m * sum(group.rows) * comb(pattern.m, pattern.n)
