"""Calibration of the dense model's linears by a text, done once for all jobs with the same model, text and pruner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from permllm.config import NMPattern
from permllm.errors import ConfigError, TrainingError
from permllm.models.checkpoint import all_finite
from permllm.models.families import ChannelGroup, channel_groups, decoder_layers, linear_at
from permllm.models.layers import LayerStream, last_states
from permllm.models.load import LoadedModel
from permllm.models.offload import placement_of
from permllm.runs.cache import cached, tensor_digest
from permllm.sparsity.method import Method
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistic, InputStatistics, Statistics


class Pruner(Method, ABC):
    """Base of the pruners.

    Attributes:
        statistics: classes of statistics that it asks of the calibration text (`permllm.sparsity`).
        updates_weights: `update` chooses the mask and corrects the kept weights; otherwise masks
            are the N:M mask of the saliency.
    """

    statistics: Statistics = ()
    updates_weights: bool = False

    @abstractmethod
    def factors(self, weight: Tensor, statistics: InputStatistics) -> SaliencyFactors:
        """Return saliency factors of `weight (C_out, C_in)`, from the statistics that the pruner names."""

    def update(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        perm: Tensor,
        pattern: NMPattern,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the updated weight and its mask (see `SparseGPT.update`).

        A pruner that updates weights has it.
        """
        raise NotImplementedError(f"{type(self).__qualname__} updates no weights")


@dataclass
class DenseCalibration:
    """Result of the calibration pass through the dense model.

    Attributes:
        factors: saliency factors of every linear, by module path, on the CPU.
        target: output of the last decoder layer, `(samples, tokens, hidden)` on the host, which
            learning matches.
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
            found = member_factors(model, group, pruner, statistics[group.name])
            factors |= {path: one.to("cpu") for path, one in found.items()}
    return DenseCalibration(factors, stream.states())


def shared_calibration(
    loaded: LoadedModel,
    tokens: Tensor,
    pruner: Pruner,
    pruner_settings: Mapping[str, Any],
    batch_size: int,
    compute_dtype: torch.dtype,
    norm_tokens: int = 1,
) -> DenseCalibration:
    """Return the result of `calibrate_dense`, or what an earlier job kept of it.

    The target follows from model and text alone, so that jobs with another pruner do not keep it a
    second time. The saliency of a pruner that is not of this package is not kept, nor is anything
    of a model without an identity.

    Args:
        loaded: the dense model.
        tokens: int64 `(samples, length)`.
        pruner: whose statistics are needed.
        pruner_settings: plain values that `pruner` was made from.
        batch_size: samples a forward.
        compute_dtype: of the model's matrix products.
        norm_tokens: as in `InputStatistics`.
    """

    @cache  # one pass gives both
    def calibrated() -> DenseCalibration:
        groups = channel_groups(loaded.model)
        return calibrate_dense(
            loaded.model, groups, tokens, pruner, batch_size, compute_dtype, norm_tokens
        )

    kept = partial(_kept, loaded, tokens, batch_size, compute_dtype)
    if type(pruner).__module__.partition(".")[0] == __name__.partition(".")[0]:
        of_pruner = {"pruner": dict(pruner_settings), "norm_tokens": norm_tokens}
        factors = unpacked_factors(
            kept("saliency", of_pruner, lambda: packed_factors(calibrated().factors))
        )
    else:
        # The version of this package is part of the key; that of someone's own pruner is not known.
        factors = calibrated().factors
    return DenseCalibration(
        factors, kept("target", {}, lambda: {"target": calibrated().target})["target"]
    )


def shared_target(
    loaded: LoadedModel, tokens: Tensor, batch_size: int, compute_dtype: torch.dtype
) -> Tensor:
    """Return the output of the dense model's last decoder layer for further tokens, or what an earlier job kept of it.

    Args:
        loaded: the dense model.
        tokens: int64 `(samples, length)`.
        batch_size: samples a forward.
        compute_dtype: of the model's matrix products.

    Returns:
        `(samples, length, hidden)` on the host.
    """

    def compute() -> dict[str, Tensor]:
        return {"target": last_states(loaded.model, tokens, batch_size, compute_dtype)}

    return _kept(loaded, tokens, batch_size, compute_dtype, "target", {}, compute)["target"]


def _kept(
    loaded: LoadedModel,
    tokens: Tensor,
    batch_size: int,
    compute_dtype: torch.dtype,
    kind: str,
    more: Mapping[str, Any],
    compute: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return tensors by name that follow from model, text and `more`: computed, or those that an earlier job kept."""
    if not loaded.identity:
        return compute()
    identity = {
        "model": loaded.identity,
        "tokens": tensor_digest(tokens),
        "batch_size": batch_size,
        "compute_dtype": str(compute_dtype),
        "device": loaded.model.device.type,
    }
    return cached(kind, identity | dict(more), compute)


def packed_factors(factors: Mapping[str, SaliencyFactors]) -> dict[str, Tensor]:
    """Return factors by module path as tensors by name, exactly."""
    packed = {}
    for path, values in factors.items():
        packed[f"{path}/power"] = torch.tensor(values.power)
        packed[f"{path}/column"] = values.column
        if values.row is not None:
            packed[f"{path}/row"] = values.row
    return packed


def unpacked_factors(tensors: Mapping[str, Tensor]) -> dict[str, SaliencyFactors]:
    """Return the factors that `packed_factors` has packed."""
    paths = [name.removesuffix("/power") for name in tensors if name.endswith("/power")]
    return {
        path: SaliencyFactors(
            int(tensors[f"{path}/power"]), tensors[f"{path}/column"], tensors.get(f"{path}/row")
        )
        for path in paths
    }


def member_factors(
    model: nn.Module, group: ChannelGroup, pruner: Pruner, statistics: InputStatistics
) -> dict[str, SaliencyFactors]:
    """Return the saliency factors of the linears of a group, by path, from what they read.

    Raises:
        ConfigError: the pruner gives something else than factors of this linear.
        TrainingError: they are not finite, as where the states of a float16 model overflow.
    """
    return {
        path: _factors_of(pruner, path, linear_at(model, path).weight, statistics)
        for path in group.members
    }


def _factors_of(
    pruner: Pruner, path: str, weight: Tensor, statistics: InputStatistics
) -> SaliencyFactors:
    factors: object = pruner.factors(weight, statistics)
    name = f"{type(pruner).__module__}.{type(pruner).__qualname__}"
    if not isinstance(factors, SaliencyFactors):
        raise ConfigError(
            f"{name}: `factors` must give SaliencyFactors, and gave a {type(factors).__name__}"
        )
    (rows, channels), column, row = weight.shape, factors.column, factors.row
    terms = len(column) if row is not None else 1
    if tuple(column.shape) not in ((terms, channels), (rows, channels)) or (
        row is not None and row.shape != (terms, rows)
    ):
        raise ConfigError(
            f"{name}: the factors of {path}, ({rows}, {channels}), must be (K, {channels}) and (K, {rows}), or a score "
            f"({rows}, {channels}) and None; they are column {tuple(column.shape)}, row {row if row is None else row.shape}"
        )
    for part in (column, row):
        if part is not None and not all_finite(part):
            raise TrainingError(
                f"the saliency of {path} is not finite: are its inputs too large for {weight.dtype}, or its weights broken?"
            )
        if part is not None and bool(part.amin() < 0):
            raise ConfigError(f"{name}: the factors of {path} must not be negative")
    return factors


def by_layer(
    model: nn.Module, groups: list[ChannelGroup], label: str
) -> Iterator[tuple[int, list[ChannelGroup]]]:
    """Give the groups of each decoder layer, whose weights are there, with a bar of progress; none of a dense layer."""
    placement = placement_of(model)
    for index in tqdm(range(len(decoder_layers(model))), desc=label, unit="layer"):
        with placement.layer(index):
            yield index, [group for group in groups if group.layer == index]


@contextmanager
def collecting(
    model: nn.Module,
    groups: list[ChannelGroup],
    kinds: Iterable[type[InputStatistic]],
    norm_tokens: int = 1,
) -> Iterator[dict[str, InputStatistics]]:
    """Sum statistics of what each group reads while the block runs; the first member speaks for all of its group."""
    device = next(model.parameters()).device
    statistics = {
        group.name: InputStatistics(group.channels, device, kinds, norm_tokens) for group in groups
    }
    with ExitStack() as hooks:
        for group in groups:
            linear, sums = linear_at(model, group.members[0]), statistics[group.name]
            hooks.enter_context(
                linear.register_forward_pre_hook(lambda _, args, sums=sums: sums.update(args[0]))
            )
        yield statistics
