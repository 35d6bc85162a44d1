"""Model, text and targets of learning; masked linears in the places of the model's linears."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from permllm.models.families import ChannelGroup, linear_at
from permllm.models.layers import Teacher
from permllm.models.offload import placement_of
from permllm.settings.config import NMPattern
from permllm.sparsity.saliency import SaliencyFactors, saliency

MaskedLinear = TypeVar("MaskedLinear", bound=nn.Module)


@dataclass
class LearningProblem:
    """Model, text and targets of learning.

    Attributes:
        model: the dense model; permutations and masks learn without changing it.
        groups: its pruned channel groups, in all layers.
        tokens: int64 `(windows, tokens)`, the text to learn from.
        factors: saliency factors of every linear, by module path.
        target: dense output of the last decoder layer, `(windows, tokens, hidden)` on the host, or
            its teacher.
        calibration: int64 `(windows, tokens)`, the text of the factors.
        pattern: N:M of the groups.
        seed: seed of the initial logits and of the order of the windows.
        calibration_batch_size: windows in a forward without gradients.
        directory: folder of the checkpoint; None: no checkpoint.
        on_step: called after each step with its number, loss, temperature, flips and step_seconds.
        on_epoch: called after each epoch with its entry of the history.
        on_resume: called before learning with the entries of all finished epochs.
    """

    model: nn.Module
    groups: list[ChannelGroup]
    tokens: Tensor
    factors: dict[str, SaliencyFactors]
    target: Tensor | Teacher
    calibration: Tensor
    pattern: NMPattern
    seed: int
    calibration_batch_size: int = 8
    directory: Path | None = None
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None
    on_epoch: Callable[[dict[str, Any]], None] = lambda values: None
    on_resume: Callable[[list[dict[str, Any]]], None] = lambda epochs: None

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return next(self.model.parameters()).device

    def factors_of(self, path: str) -> SaliencyFactors:
        """Return the saliency factors of a linear, on the device."""
        return self.factors[path].to(self.device)

    def saliency_of(self, path: str) -> Tensor:
        """Return the saliency of a linear, `(C_out, C_in)` on the device."""
        with placement_of(self.model).layer_of(path):
            return saliency(linear_at(self.model, path).weight, self.factors_of(path))


@contextmanager
def replaced_linears(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    replacement: Callable[[ChannelGroup, str, nn.Linear], MaskedLinear],
    change: Callable[[ChannelGroup, Tensor], Tensor],
    back: Callable[[ChannelGroup, Tensor], Tensor],
) -> Iterator[dict[str, MaskedLinear]]:
    """Replace every linear of some groups inside the context; yield the masked linears by path.

    Args:
        replacement: returns the masked linear for the linear at a path; called before `change`.
        change: returns a weight in the layout for learning.
        back: returns such a weight in its original layout.
    """
    placement = placement_of(model)
    replaced: list[tuple[ChannelGroup, str, nn.Linear]] = []
    masked_linears: dict[str, MaskedLinear] = {}
    try:
        for group in groups:
            with placement.layer(group.layer):
                for path in group.members:
                    linear = linear_at(model, path)
                    masked_linears[path] = replacement(group, path, linear)
                    placement.rearrange(linear, partial(change, group))
                    replaced.append((group, path, linear))
                    model.set_submodule(path, masked_linears[path])
        yield masked_linears
    finally:
        for group, path, linear in replaced:
            placement.restore(linear, partial(back, group))
            model.set_submodule(path, linear)
