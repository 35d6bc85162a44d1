"""Phases before the pruning of the layers: calibration, allocation, permutation, mask.

The later phases take `calibration`, the result of `calibrate`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from permllm.allocation.base import Allocation
from permllm.errors import ConfigError, TrainingError
from permllm.models.checkpoint import all_finite
from permllm.models.families import ChannelGroup, linear_at
from permllm.models.layers import LayerStream, Teacher, last_states
from permllm.models.offload import placement_of
from permllm.models.selection import recorded_patterns, without_dense
from permllm.pruner.base import Pruner
from permllm.pruning.checks import check_result
from permllm.pruning.methods import (
    Job,
    ModelGroups,
    check_groups,
    learning_problem,
    stored_windows,
    windows_for,
)
from permllm.runtime.precision import products_in
from permllm.sparsity.method import Method
from permllm.sparsity.saliency import SaliencyFactors
from permllm.sparsity.statistics import InputStatistics, by_layer, collecting
from permllm.store.cache import cached, tensor_digest
from permllm.store.files import ALLOCATION, MASKS, PERMUTATIONS, read_json, write_json
from permllm.store.tensors import load_masks, load_permutations, save_masks, save_tensors
from permllm.training.problem import LearningProblem

log = logging.getLogger(__name__)


@dataclass
class DenseCalibration:
    """Result of the calibration pass through the dense model; empty: nothing needed the pass.

    Attributes:
        factors: saliency factors of every linear, by module path, on the CPU.
        target: target of learning, the output of the last decoder layer, `(windows, tokens,
            hidden)` on the host, of the first windows. A `Teacher` computes that of others.
    """

    factors: dict[str, SaliencyFactors]
    target: Tensor


def calibrate(job: Job) -> DenseCalibration:
    """Calibrate all linears of the dense model, or read the result from the cache.

    Factors and targets are apart in the cache, and of all linears, so that jobs with another pruner
    or `keep_dense` can use them.
    """
    with job.record.phase("calibrate", job.device):
        if job.is_layerwise:
            return DenseCalibration({}, torch.empty(0))
        tokens = job.windows[: job.config.calibration.samples]
        pruner = job.methods.pruner
        permutation = job.methods.permutation
        norm_tokens = (permutation.norm_tokens if permutation else 1) or tokens.shape[1]

        @cache  # one pass gives factors and target
        def calibrated() -> DenseCalibration:
            return calibrate_dense(
                job.loaded.model,
                job.groups.every,
                tokens,
                pruner,
                batch_size=job.config.calibration.batch_size,
                compute_dtype=job.compute_dtype,
                norm_tokens=norm_tokens,
            )

        packed = _cached_values(
            job,
            tokens,
            "saliency",
            lambda: packed_factors(calibrated().factors),
            pruner,
            pruner=dict(job.config.pruner),
            norm_tokens=norm_tokens,
        )
        target = _cached_values(job, tokens, "target", lambda: {"target": calibrated().target})
        targets = _with_extra_targets(job, target["target"])
        return DenseCalibration(unpacked_factors(packed), targets)


def _dense_problem(job: Job, group: str, calibration: DenseCalibration) -> LearningProblem:
    learned_from = windows_for(getattr(job.methods, group), job.config.calibration.samples)
    target: Tensor | Teacher
    if learned_from.stop > len(calibration.target):
        target = Teacher(job.loaded.model, job.windows[learned_from])
    else:
        target = calibration.target[learned_from]
    return learning_problem(job, group, calibration.factors, target)


def allocate(job: Job, calibration: DenseCalibration) -> Job:
    """Return the job with the channel groups that its allocation prunes.

    Raises ConfigError if it prunes none, or one that a method cannot work on.
    """
    method = job.methods.allocation
    if method is None:
        return job
    with job.record.phase("allocate", job.device):
        allocation = job.record.get_or_compute(
            ALLOCATION,
            lambda: _found_allocation(job, method, calibration),
            write_json,
            read_json,
        )
    if allocation["sensitivity"]:
        job.record.metrics["sensitivity"] = allocation["sensitivity"]
    every = job.groups.every
    groups = ModelGroups(every, without_dense(job.groups.pruned, allocation["dense"]))
    if not groups.pruned:
        raise ConfigError(
            f"allocation={job.config.allocation['name']} keeps every linear dense: nothing is left "
            "to prune"
        )
    check_groups(job.config, job.methods, job.loaded.model, groups)
    sparse = sum(group.weights for group in groups.pruned)
    share = 1 - sparse / sum(group.weights for group in every)
    log.info("%.1f %% of the linears' weights stay dense", 100 * share)
    return replace(job, groups=groups)


def _found_allocation(
    job: Job, method: Allocation, calibration: DenseCalibration
) -> dict[str, Any]:
    """Return `sensitivity` by channel group, and the paths of the linears to keep `dense`."""
    problem = _dense_problem(job, "allocation", calibration)

    def measured() -> dict[str, float]:
        with products_in(job.compute_dtype, job.device):
            return method.sensitivity(problem)

    sensitivity = _cached_values(
        job,
        problem.tokens,
        "sensitivity",
        measured,
        *(method, job.methods.pruner),
        method=type(method).__name__,
        windows=method.windows,
        pruner=dict(job.config.pruner),
        patterns=recorded_patterns(job.groups.every, job.groups.pruned),
        pattern=job.config.sparsity,
    )
    dense = method.dense_linears(problem, job.groups.every, sensitivity)
    return {"sensitivity": sensitivity, "dense": sorted(dense)}


def find_permutations(job: Job, calibration: DenseCalibration) -> Mapping[str, Tensor] | None:
    """Return the permutations of the channel groups, int64 `(C_in,)` by their names.

    None: each is found while its layer is pruned.
    """
    method = job.methods.permutation
    if method is not None and job.is_layerwise:
        return None

    def compute() -> dict[str, Tensor]:
        if method is None:
            return {group.name: torch.arange(group.channels) for group in job.groups.pruned}
        problem = _dense_problem(job, "permutation", calibration)
        with products_in(job.compute_dtype, job.device):
            permutations = method.permutations(problem)
        return {group.name: permutations[group.name].cpu() for group in job.groups.pruned}

    with job.record.phase("permute", job.device):
        return job.record.get_or_compute(PERMUTATIONS, compute, save_tensors, load_permutations)


def find_masks(
    job: Job, calibration: DenseCalibration, permutations: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    """Return the masks of all linears under the permutations, bool `(C_out, C_in)` by path.

    None: the pruner chooses each mask.
    """
    method = job.methods.mask
    if method is None or permutations is None:
        return None

    def compute() -> Mapping[str, Tensor]:
        problem = _dense_problem(job, "mask", calibration)
        with products_in(job.compute_dtype, job.device):
            masks = method.masks(problem, permutations)
        for group in job.groups.pruned:
            for path, rows in zip(group.members, group.rows, strict=True):
                where = f"mask={job.config.mask['name']}: {path}"
                shape = torch.Size((rows, group.channels))
                check_result(where, shape, masks[path], permutations[group.name], problem.pattern)
        return masks

    with job.record.phase("mask", job.device):
        return job.record.get_or_compute(MASKS, compute, save_masks, load_masks)


def calibrate_dense(
    model: nn.Module,
    groups: list[ChannelGroup],
    tokens: Tensor,
    pruner: Pruner,
    batch_size: int,
    compute_dtype: torch.dtype | None = None,
    norm_tokens: int = 1,
) -> DenseCalibration:
    """Return the saliency factors of all linears of the dense model, and the target of learning.

    Args:
        model: dense model of a known family.
        groups: all its channel groups.
        tokens: int64 `(windows, tokens)`.
        pruner: pruner that makes the factors; only one layer's statistics are in memory.
        batch_size: windows in a forward.
        compute_dtype: dtype of the model's matrix products; None: dtype of its weights.
        norm_tokens: as in `InputStatistics`.
    """
    stream = LayerStream(model, tokens, batch_size, compute_dtype)
    factors: dict[str, SaliencyFactors] = {}
    for index, members in by_layer(model, groups, "calibrate"):
        with collecting(model, members, pruner.statistics, norm_tokens) as statistics:
            stream.advance(index)
        for group in members:
            of_group = member_factors(model, group, pruner, statistics[group.name])
            for path, of_linear in of_group.items():
                factors[path] = of_linear.to("cpu")
    return DenseCalibration(factors, stream.states())


def _with_extra_targets(job: Job, target: Tensor) -> Tensor:
    """Return the targets that permutations and masks need stored, after those of calibration."""
    samples = len(target)
    learned = job.methods.learned
    before_pruning = [learned[group] for group in ("permutation", "mask") if group in learned]
    streams = placement_of(job.loaded.model).streams
    stored = stored_windows(before_pruning, samples, job.window_bytes, streams)
    extra = job.windows[samples:stored]
    if not len(extra):
        return target
    batch_size = job.config.calibration.batch_size
    computed = _cached_values(
        job,
        extra,
        "target",
        lambda: {"target": last_states(job.loaded.model, extra, batch_size, job.compute_dtype)},
    )
    return torch.cat([target, computed["target"]])


def _cached_values(
    job: Job,
    tokens: Tensor,
    kind: str,
    compute: Callable[[], dict[str, Any]],
    *methods: Method,
    **key: Any,
) -> dict[str, Any]:
    """Return tensors or numbers by name, which depend on model, text, `methods` and `key`.

    Results of a model without an identity, and of methods of another package, whose commit no key
    has, are not cached. The record gets `cached`: by kind, whether the cache had the result.
    """
    ours = all(type(method).__module__.startswith("permllm.") for method in methods)
    if not (job.loaded.identity and ours):
        return compute()
    identity = {
        "model": job.loaded.identity,
        "tokens": tensor_digest(tokens),
        "batch_size": job.config.calibration.batch_size,
        "dtype": str(job.loaded.model.dtype),
        "compute_dtype": str(job.compute_dtype),
        "device": job.device.type,
    }
    return cached(kind, identity | key, compute, job.record.metrics.setdefault("cached", {}))


def packed_factors(factors: Mapping[str, SaliencyFactors]) -> dict[str, Tensor]:
    """Return factors by module path as tensors by name, without loss."""
    packed: dict[str, Tensor] = {}
    for path, of_linear in factors.items():
        packed[f"{path}/power"] = torch.tensor(of_linear.power)
        packed[f"{path}/column"] = of_linear.column
        if of_linear.row is not None:
            packed[f"{path}/row"] = of_linear.row
    return packed


def unpacked_factors(tensors: Mapping[str, Tensor]) -> dict[str, SaliencyFactors]:
    """Return the factors out of the result of `packed_factors`."""
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
    """Return the saliency factors of the linears of a group, by path.

    Raises TrainingError if they are not finite, perhaps because a float16 model overflows.
    """
    factors = {}
    for path in group.members:
        weight = linear_at(model, path).weight
        of_linear = pruner.factors(weight, statistics)
        if not (
            all_finite(of_linear.column) and (of_linear.row is None or all_finite(of_linear.row))
        ):
            raise TrainingError(
                f"the saliency of {path} is not finite: are its inputs too large for "
                f"{weight.dtype}, or its weights broken?"
            )
        factors[path] = of_linear
    return factors
