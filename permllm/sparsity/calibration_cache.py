"""The calibration pass through the dense model, done once for all jobs that have the same model, text and pruner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from permllm.models.families import channel_groups
from permllm.models.layers import last_states
from permllm.models.load import LoadedModel
from permllm.runs.cache import cached, tensor_digest
from permllm.sparsity.calibrate import DenseCalibration, Pruner, calibrate_dense
from permllm.sparsity.saliency import SaliencyFactors

_TARGET = "target"


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

    The target follows from model and text alone, so that jobs with another pruner do not keep it a second time. The saliency
    of a pruner that is not of this package is not kept, nor is anything of a model without an identity.

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
        return calibrate_dense(loaded.model, groups, tokens, pruner, batch_size, compute_dtype, norm_tokens)

    if not loaded.identity:
        return calibrated()
    identity = _identity(loaded, tokens, batch_size, compute_dtype)
    if type(pruner).__module__.partition(".")[0] == __name__.partition(".")[0]:
        of_pruner = {"pruner": dict(pruner_settings), "norm_tokens": norm_tokens}
        kept = cached("saliency", identity | of_pruner, lambda: packed_factors(calibrated().factors))
        factors = unpacked_factors(kept)
    else:
        # The version of this package is part of the key; that of someone's own pruner is not known.
        factors = calibrated().factors
    target = cached("target", identity, lambda: {_TARGET: calibrated().target})
    return DenseCalibration(factors, target[_TARGET])


def shared_target(loaded: LoadedModel, tokens: Tensor, batch_size: int, compute_dtype: torch.dtype) -> Tensor:
    """Return the output of the dense model's last decoder layer for further tokens, or what an earlier job kept of it.

    Args:
        loaded: the dense model.
        tokens: int64 `(samples, length)`.
        batch_size: samples a forward.
        compute_dtype: of the model's matrix products.

    Returns:
        `(samples, length, hidden)` on the host.
    """
    compute = partial(last_states, loaded.model, tokens, batch_size, compute_dtype)
    if not loaded.identity:
        return compute()
    identity = _identity(loaded, tokens, batch_size, compute_dtype)
    return cached("target", identity, lambda: {_TARGET: compute()})[_TARGET]


def _identity(loaded: LoadedModel, tokens: Tensor, batch_size: int, compute_dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model": loaded.identity,
        "tokens": tensor_digest(tokens),
        "batch_size": batch_size,
        "compute_dtype": str(compute_dtype),
        "device": loaded.model.device.type,
    }


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
        path: SaliencyFactors(int(tensors[f"{path}/power"]), tensors[f"{path}/column"], tensors.get(f"{path}/row"))
        for path in paths
    }
