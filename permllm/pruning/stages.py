"""Stages that make a pruned model out of a dense model: calibrate, permute, mask, prune.

The stages share arguments: `drawn` are the windows of the text, int64 `(windows, tokens)`, the
calibration windows first. `dense` is the result of `calibrate`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from permllm.errors import ConfigError
from permllm.models.families import channel_groups, linear_at
from permllm.models.selection import differing_patterns
from permllm.permutation.base import checked_order
from permllm.pruning.calibration import DenseCalibration, shared_calibration, shared_target
from permllm.pruning.layerwise import Found, PrunedModel, prune
from permllm.pruning.methods import Job, learning_problem, windows_for
from permllm.runtime.precision import products_in
from permllm.sparsity.collecting import by_layer
from permllm.store.files import MASKS, PERMUTATIONS, WEIGHTS, layer_file
from permllm.store.tensors import load_masks, load_orders, save_masks, save_tensors
from permllm.training.problem import LearningProblem

log = logging.getLogger(__name__)


def prune_model(job: Job, read_tokens: Callable[[], Tensor]) -> PrunedModel:
    """Prune the job's model in place; the record keeps seconds, measures and files.

    Args:
        job: job with model and methods.
        read_tokens: returns the calibration windows and those after them that the methods learn
            from, int64 `(windows, tokens)`; its time counts as calibration.
    """
    record = job.record
    earlier = Found()
    statistics_are_dense = job.config.calibration.statistics == "dense"
    with record.stage("calibrate", job.device):
        drawn = read_tokens()
        dense = None
        if statistics_are_dense or not job.methods.permutation.local:
            dense = calibrate(job, drawn)
    if dense is not None:
        orders = found_orders(job, drawn, dense)
        factors = dense.factors if statistics_are_dense else None
        earlier = Found(factors, orders, found_masks(job, drawn, dense, orders))
    del dense  # frees the targets of learning
    with record.stage("prune", job.device):
        pruned = prune(job, drawn, earlier)
        if pruned.violations:
            log.warning(
                "the pruned model is not N:M: %d groups of M have more than N nonzeros",
                pruned.violations,
            )
        if earlier.orders is None:
            record.keep(PERMUTATIONS, pruned.orders, save_tensors)
        if earlier.masks is None:
            record.keep(MASKS, pruned.masks, save_masks)
        figures = _figures(job, pruned)
        if figures["sparsity"]["weights_kept"]:
            _keep_weights(job)
        record.metrics |= figures
    return pruned


def calibrate(job: Job, drawn: Tensor) -> DenseCalibration:
    """Calibrate all linears of the dense model, so that jobs with other `keep_dense` can reuse it.

    The result has targets for the calibration windows, and for the windows after them from which
    permutations and masks learn.
    """
    config = job.config
    samples = config.calibration.samples
    batch_size = config.calibration.batch_size
    dense = shared_calibration(
        job.loaded,
        drawn[:samples],
        job.methods.pruner,
        config.pruner,
        batch_size=batch_size,
        compute_dtype=job.products,
        norm_tokens=drawn.shape[1] if config.permutation.get("conventions") == "paper" else 1,
    )
    stops = [windows_for(method, samples).stop for method in job.methods.learned.values()]
    further = slice(samples, max(stops, default=0))
    if further.stop > samples:
        calibrated = dense.target
        # Targets of windows that only the reconstruction reads stay uninitialised.
        dense.target = calibrated.new_empty(len(drawn), *calibrated.shape[1:])
        dense.target[:samples] = calibrated
        dense.target[further] = shared_target(
            job.loaded, drawn[further], batch_size=batch_size, compute_dtype=job.products
        )
    return dense


def _of_the_dense(job: Job, group: str, drawn: Tensor, dense: DenseCalibration) -> LearningProblem:
    """Return the problem of a method that learns before the model is pruned."""
    samples = job.config.calibration.samples
    learned_from = windows_for(getattr(job.methods, group), samples)
    return learning_problem(
        job,
        group,
        tokens=drawn[learned_from],
        calibration=drawn[:samples],
        factors=dense.factors,
        target=dense.target[learned_from],
    )


def found_orders(job: Job, drawn: Tensor, dense: DenseCalibration) -> Mapping[str, Tensor]:
    """Return the permutations of the channel groups, int64 `(C_in,)` by their names."""

    def compute() -> dict[str, Tensor]:
        problem = _of_the_dense(job, "permutation", drawn, dense)
        with products_in(job.products, job.device):
            orders = job.methods.permutation.orders(problem)
        if not isinstance(orders, Mapping):
            raise ConfigError(
                f"permutation={job.config.permutation['name']}: `orders` returns a "
                f"{type(orders).__name__}; expected a dict by channel group"
            )
        return {
            group.name: checked_order(job.config, group, orders.get(group.name))
            for group in job.groups
        }

    with job.record.stage("permute", job.device):
        return job.record.kept(PERMUTATIONS, compute, save_tensors, load_orders)


def found_masks(
    job: Job, drawn: Tensor, dense: DenseCalibration, orders: Mapping[str, Tensor]
) -> Mapping[str, Tensor] | None:
    """Return the masks of all linears under the permutations; None: the pruner chooses them."""
    if job.methods.mask.local:
        return None

    def compute() -> Mapping[str, Tensor]:
        problem = _of_the_dense(job, "mask", drawn, dense)
        with products_in(job.products, job.device):
            return job.methods.mask.masks(problem, orders)

    with job.record.stage("mask", job.device):
        return job.record.kept(MASKS, compute, save_masks, load_masks)


def _keep_weights(job: Job) -> None:
    """Write the changed weights of each layer."""
    for index, groups in by_layer(job.loaded.model, job.groups, "keep"):
        paths = [path for group in groups for path in group.members]
        if paths:
            weights = {path: linear_at(job.loaded.model, path).weight.data for path in paths}
            job.record.keep(layer_file(WEIGHTS, index), weights, save_tensors)


def _figures(job: Job, pruned: PrunedModel) -> dict[str, Any]:
    """Return the measures of a pruned model for `metrics.json`, before its evaluation."""
    groups = channel_groups(job.loaded.model)
    patterns = differing_patterns(groups, job.groups)
    of_model = sum(group.channels * sum(group.rows) for group in groups)
    weights = sum(group.channels * sum(group.rows) for group in job.groups)
    nonzeros = sum(int(mask.sum()) for mask in pruned.masks.values())
    return {
        "sparsity": {
            "pattern": str(job.config.pattern),
            **({"patterns": patterns} if patterns else {}),
            "fraction": (weights - nonzeros) / weights,
            "of_model": (weights - nonzeros) / of_model,
            "violations": pruned.violations,
            "weights_changed": job.methods.change_weights,
            "weights_kept": job.methods.change_weights and job.config.save_weights,
        },
        "retained_saliency": pruned.retained,
        "output_error": pruned.output_error,
        "moved_channels": pruned.moved,
    }
