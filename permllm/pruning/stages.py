"""Stages between a dense model and the loop that prunes its layers: calibrate, permute, mask.

The stages share arguments: `windows` of the text, int64 `(windows, tokens)`, the calibration
windows first, and `calibration`, the result of
`permllm.pruning.calibration.calibrate`.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from permllm.models.families import linear_at
from permllm.models.selection import differing_patterns
from permllm.permutation.base import checked_order
from permllm.pruning.calibration import DenseCalibration
from permllm.pruning.layerwise import PrunedModel
from permllm.pruning.methods import Job, learning_problem, windows_for
from permllm.runtime.precision import products_in
from permllm.sparsity.collecting import by_layer
from permllm.store.files import MASKS, PERMUTATIONS, WEIGHTS, layer_file
from permllm.store.tensors import load_masks, load_orders, save_masks, save_tensors
from permllm.training.problem import LearningProblem

log = logging.getLogger(__name__)


def _dense_problem(
    job: Job, group: str, windows: Tensor, calibration: DenseCalibration
) -> LearningProblem:
    """Return the problem of a method that learns before the model is pruned."""
    samples = job.config.calibration.samples
    learned_from = windows_for(getattr(job.methods, group), samples)
    return learning_problem(
        job,
        group,
        tokens=windows[learned_from],
        calibration=windows[:samples],
        factors=calibration.factors,
        target=calibration.target[learned_from],
    )


def find_permutations(
    job: Job, windows: Tensor, calibration: DenseCalibration
) -> Mapping[str, Tensor]:
    """Return the permutations of the channel groups, int64 `(C_in,)` by their names."""

    def compute() -> dict[str, Tensor]:
        problem = _dense_problem(job, "permutation", windows, calibration)
        with products_in(job.products, job.device):
            permutations = job.methods.permutation.orders(problem)
        return {
            group.name: checked_order(job.config, group, permutations.get(group.name))
            for group in job.groups.pruned
        }

    return job.record.kept(PERMUTATIONS, compute, save_tensors, load_orders)


def find_masks(
    job: Job, windows: Tensor, calibration: DenseCalibration, permutations: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the masks of all linears under the permutations, bool `(C_out, C_in)` by path."""

    def compute() -> Mapping[str, Tensor]:
        problem = _dense_problem(job, "mask", windows, calibration)
        with products_in(job.products, job.device):
            masks: Mapping[str, Tensor] = job.methods.mask.masks(problem, permutations)
        return masks

    return job.record.kept(MASKS, compute, save_masks, load_masks)


def record_pruning(job: Job, pruned: PrunedModel) -> None:
    """Write permutations, masks, changed weights and measures of a pruned model to the record."""
    record = job.record
    if pruned.violations:
        log.warning(
            "the pruned model is not N:M: %d groups of M have more than N nonzeros",
            pruned.violations,
        )
    record.kept(PERMUTATIONS, lambda: pruned.orders, save_tensors, load_orders)
    record.kept(MASKS, lambda: pruned.masks, save_masks, load_masks)
    figures = _figures(job, pruned)
    if figures["sparsity"]["weights_kept"]:
        _keep_weights(job)
    record.metrics |= figures


def _keep_weights(job: Job) -> None:
    """Write the changed weights of each layer."""
    for index, groups in by_layer(job.loaded.model, job.groups.pruned, "keep"):
        paths = [path for group in groups for path in group.members]
        if paths:
            weights = {path: linear_at(job.loaded.model, path).weight.data for path in paths}
            job.record.keep(layer_file(WEIGHTS, index), weights, save_tensors)


def _figures(job: Job, pruned: PrunedModel) -> dict[str, Any]:
    """Return the measures of a pruned model for `metrics.json`, before its evaluation."""
    patterns = differing_patterns(job.groups.every, job.groups.pruned)
    of_model = sum(group.channels * sum(group.rows) for group in job.groups.every)
    weights = sum(group.channels * sum(group.rows) for group in job.groups.pruned)
    nonzeros = sum(int(mask.sum()) for mask in pruned.masks.values())
    return {
        "compute_dtype": str(job.products).removeprefix("torch."),
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
