"""Masks by a distribution over the N:M candidates of each group, which learns (MaskLLM).

Each group of M weights has K = C(M, N) candidates s_k in {0, 1}^M with N ones, and a gate p_k for
each of them. In a step every forward multiplies by a soft mask,

    y = softmax((kappa p + g) / tau)        m = sum_k y_k s_k        g: Gumbel noise

with a temperature tau that falls and a scale kappa that rises. The result is the candidate with the
largest gate. The formulas are those of arXiv 2409.17481. Settings were read in MaskLLM's
public code, of which nothing is copied: its licence is not open. The patent application
US 2025-0335769 A1 covers the method.
"""

import random
from functools import reduce
from itertools import combinations, compress
from math import comb
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from permllm.errors import ConfigError
from permllm.mask.score import MaskLearner, ScoreMask
from permllm.mask.score_linear import ScoreLinear
from permllm.models.families import ChannelGroup
from permllm.runtime.precision import product_dtype, products_as_they_are
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


class Gates(nn.Module):
    """Gates of a linear, which start near the pruner's mask.

    Attributes:
        gates: `(K, C_in / M, C_out)`.
        candidates: `(K, M)`, zeros and ones.
        norm: `||W||^2`.
        temperature, scale: tau and kappa of the present step.
        noise_seed: seed of the noise of the present step.
        keeps_masked: as in `Scores`.
    """

    keeps_masked = True
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
        self._keeping = candidates.t().tolist()  # for each place of a group, who keeps it
        prior = nm_mask(saliency(weight, factors), pattern).t().unflatten(0, (-1, pattern.m))
        with products_as_they_are(self.candidates):  # the gates get the dtype of this product
            agreement = torch.einsum("km,gmr->kgr", self.candidates, prior.to(factors.column.dtype))
        noise = torch.randn(agreement.shape, generator=generator).to(agreement)
        centred = agreement - pattern.n**2 / pattern.m
        self.gates = nn.Parameter(noise.mul_(_STD).add_(centred, alpha=_PRIOR))

    def soft(self) -> Tensor:
        """Return y of the present step, `(K, C_in / M, C_out)`, each time with the same noise."""
        generator = torch.Generator(self.gates.device).manual_seed(self.noise_seed)
        # By two logarithms, because drawing exponential numbers takes a CPU six times as long.
        noise = torch.empty_like(self.gates).uniform_(generator=generator)
        noise.log_().neg_().log_().neg_().div_(self.temperature)
        return noise.add(self.gates, alpha=self.scale / self.temperature).softmax(0)

    def soft_masked(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return `W * m` in a dtype, `(C_out, C_in)`, and `||W * m||^2`, for permuted `W`."""
        shares = self.soft().unbind()
        places = [reduce(torch.add, compress(shares, keeping)) for keeping in self._keeping]
        masked = torch.stack(places, 1).flatten(0, 1).t() * weight
        return masked.to(dtype), masked.square().sum()

    def mask(self) -> Tensor:
        """Return the candidate with the largest gate in each group, bool `(C_out, C_in)`."""
        return self.candidates[self.gates.argmax(0)].transpose(0, 1).flatten(1).bool()


class GumbelLinear(ScoreLinear):
    """Linear with a soft mask if gradients are computed, and otherwise with the resulting one.

    Attributes:
        scores: the gates.
        energy: `||W * m||^2` in the last forward until its backward, differentiable.
    """

    scores: Any
    energy: Tensor | None

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., C_in)`, in the original channel order, to `(..., C_out)`."""
        weight = self.linear.weight
        dtype = product_dtype(x)
        states = x if self.permutation is None else x.index_select(-1, self.permutation)
        if torch.is_grad_enabled():
            # Backward makes the soft mask again, so that it does not stay in memory.
            masked, self.energy = checkpoint(
                self.scores.soft_masked,
                weight,
                dtype,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            masked.register_hook(self._forget)
        else:
            masked = (self.permuted_mask() * weight).to(dtype)
        return functional.linear(states, masked, self.linear.bias)

    def _forget(self, _: Tensor) -> None:
        self.energy = None  # it would hold the graph of a layer that was computed again

    @override
    def permuted_mask(self) -> Tensor:
        """Return the mask of the largest gates, bool `(C_out, C_in)`, in permuted order."""
        mask: Tensor = self.scores.mask()
        return mask


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
        """Set tau, from 4 to 0.05, kappa, from 100 to 500, and the noise of a step."""
        share = progress.step / progress.steps
        self._factor = self._regularization * (1 - share)
        for path, linear in self.linears.items():
            gates: Any = linear.scores
            gates.temperature = 4.0 - 3.95 * share
            gates.scale = 100.0 + 400.0 * share
            gates.noise_seed = random.Random(f"{self._seed} {progress.step} {path}").getrandbits(63)

    @override
    def penalty(self) -> Tensor:
        """Return `-c (1 - t / T) sum ||W m||^2 / sum ||W||^2` at step t of T, over all linears."""
        linears: Any = self.linears.values()
        energy: Tensor = sum(linear.energy for linear in linears)
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
    ) -> Gates:
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
