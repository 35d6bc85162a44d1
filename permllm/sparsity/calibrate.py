"""Calibration of the dense model's linears by a text, and the pruners that ask for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from permllm.config import NMPattern
from permllm.errors import ConfigError, TrainingError
from permllm.models.checkpoint import all_finite
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.models.offload import placement_of
from permllm.sparsity.method import Method
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistic, InputStatistics, Statistics


class Pruner(Method, ABC):
    """Base of the pruners.

    Attributes:
        statistics: classes of statistics that it asks of the calibration text (`permllm.sparsity`).
        updates_weights: `update` chooses the mask and corrects the kept weights; otherwise masks are the N:M mask of the
            saliency.
    """

    statistics: Statistics = ()
    updates_weights: bool = False

    @abstractmethod
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return saliency factors of `weight (C_out, C_in)`, from the statistics that the pruner names."""

    def update(
        self, weight: Tensor, statistics: InputStatistics, perm: Tensor, pattern: NMPattern, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the updated weight and its mask (see `SparseGPT.update`). A pruner that updates weights has it."""
        raise NotImplementedError(f"{type(self).__qualname__} updates no weights")


@dataclass
class DenseCalibration:
    """Result of the calibration pass through the dense model.

    Attributes:
        factors: saliency factors of every linear, by module path, on the CPU.
        target: output of the last decoder layer, `(samples, tokens, hidden)` on the host, which learning matches.
    """

    factors: dict[str, SaliencyFactors]
    target: Tensor


def calibrate_dense(
    model: nn.Module,
    groups: list[ChannelGroup],
    tokens: Tensor,
    pruner: Pruner,
    batch_size: int,
    compute_dtype: torch.dtype | None = None,
    norm_tokens: int = 1,
) -> DenseCalibration:
    """Return the saliency factors of all linears, from the inputs that the dense model gives them, and the target of learning.

    Args:
        model: dense, of a known family.
        groups: of the model, all layers.
        tokens: int64 `(samples, length)`.
        pruner: whose statistics are needed; they exist for one layer at a time.
        batch_size: samples a forward.
        compute_dtype: of the model's matrix products; None is that of its weights.
        norm_tokens: as in `InputStatistics`.
    """
    stream = LayerStream(model, tokens, batch_size, compute_dtype)
    factors: dict[str, SaliencyFactors] = {}
    for index, members in by_layer(model, groups, "calibrate"):
        with collecting(model, members, pruner.statistics, norm_tokens) as statistics:
            stream.advance(index)
        for group in members:
            for path, found in member_factors(model, group, pruner, statistics[group.name]).items():
                factors[path] = found.to("cpu")
    return DenseCalibration(factors, stream.states())


def member_factors(
    model: nn.Module, group: ChannelGroup, pruner: Pruner, statistics: InputStatistics
) -> dict[str, SaliencyFactors]:
    """Return the saliency factors of the linears of a group, by path, from what they read.

    Raises:
        ConfigError: the pruner gives something else than factors of this linear.
        TrainingError: they are not finite, as where the states of a float16 model overflow.
    """
    found = {}
    for path in group.members:
        weight = linear_at(model, path).weight
        factors = pruner.factors(weight, statistics)
        _check_factors(pruner, path, weight, factors)
        found[path] = factors
    return found


def _check_factors(pruner: Pruner, path: str, weight: Tensor, factors: object) -> None:
    name = f"{type(pruner).__module__}.{type(pruner).__qualname__}"
    if not isinstance(factors, SaliencyFactors):
        raise ConfigError(f"{name}: `factors` must give SaliencyFactors, and gave a {type(factors).__name__}")
    (rows, channels), column, row = weight.shape, factors.column, factors.row
    terms = len(column) if row is not None else 1
    if tuple(column.shape) not in ((terms, channels), (rows, channels)) or (row is not None and row.shape != (terms, rows)):
        raise ConfigError(
            f"{name}: the factors of {path}, ({rows}, {channels}), must be (K, {channels}) and (K, {rows}), or a score "
            f"({rows}, {channels}) and None; they are column {tuple(column.shape)}, row {None if row is None else tuple(row.shape)}"
        )
    for part in (column, row):
        if part is not None and not all_finite(part):
            raise TrainingError(
                f"the saliency of {path} is not finite: are its inputs too large for {weight.dtype}, or its weights broken?"
            )
        if part is not None and bool(part.amin() < 0):
            raise ConfigError(f"{name}: the factors of {path} must not be negative")


def by_layer(model: nn.Module, groups: list[ChannelGroup], label: str) -> Iterator[tuple[int, list[ChannelGroup]]]:
    """Give the groups of each decoder layer, whose weights are there, with a bar of progress; none of a dense layer."""
    placement = placement_of(model)
    for index in tqdm(range(len(decoder_layers(model))), desc=label, unit="layer"):
        with placement.layer(index):
            yield index, [group for group in groups if group.layer == index]


@contextmanager
def collecting(
    model: nn.Module, groups: list[ChannelGroup], kinds: Iterable[type[InputStatistic]], norm_tokens: int = 1
) -> Iterator[dict[str, InputStatistics]]:
    """Sum statistics of what each group reads while the block runs; the first member speaks for all of its group."""
    statistics = {}
    handles = []
    device = next(model.parameters()).device
    for group in groups:
        linear = linear_at(model, group.members[0])
        sums = InputStatistics(group.channels, device, kinds, norm_tokens)
        statistics[group.name] = sums
        handles.append(linear.register_forward_pre_hook(lambda _, args, sums=sums: sums.update(args[0])))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
