"""What learnable channel permutation learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from permllm.models.families import ChannelGroup, linear_at
from permllm.pruning.saliency import SaliencyFactors, saliency
from permllm.sparsity import NMPattern


@dataclass
class LearningProblem:
    """What LCP learns from.

    Attributes:
        model: dense, of a known family; unchanged afterwards.
        groups: its channel groups, all layers.
        tokens: int64 `(samples, length)`.
        factors: saliency factors of every linear, by module path.
        target: dense output of the last decoder layer, `(samples, length, hidden)` on the host.
        pattern: N:M.
        seed: of the initial logits and the order of samples.
        calibration_batch_size: samples a forward where nothing is learned.
        directory: where the checkpoint goes; None keeps none.
        on_step: called after each step with loss, temperature, flips and seconds.
        on_pass: called after each pass with the same and the memory.
    """

    model: nn.Module
    groups: list[ChannelGroup]
    tokens: Tensor
    factors: dict[str, SaliencyFactors]
    target: Tensor
    pattern: NMPattern
    seed: int
    calibration_batch_size: int = 8
    directory: Path | None = None
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None
    on_pass: Callable[[dict[str, float | None]], None] = lambda values: None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def factors_of(self, path: str) -> SaliencyFactors:
        """Saliency factors of a linear, on its device."""
        return self.factors[path].to(linear_at(self.model, path).weight.device)

    def saliency_of(self, path: str) -> Tensor:
        """Saliency of a linear, `(C_out, C_in)` on its device."""
        return saliency(linear_at(self.model, path).weight, self.factors_of(path))
