"""Stages that make a pruned model out of a dense one: calibrate, permute, learn masks, prune."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from permllm.models.families import channel_groups, linear_at
from permllm.models.selection import differing_patterns
from permllm.pruning.layerwise import Found, PrunedModel, prune
from permllm.pruning.methods import Job
from permllm.pruning.ordering import calibrate, found_masks, found_orders
from permllm.runs.names import MASKS, PERMUTATIONS, WEIGHTS, layer_file
from permllm.runs.tensors import load_masks, load_orders, save_masks, save_tensors
from permllm.sparsity.calibrate import by_layer

log = logging.getLogger(__name__)


def prune_model(job: Job, read_tokens: Callable[[], Tensor]) -> PrunedModel:
    """Prune the job's model in place. Its record keeps the seconds of the stages, the figures and the files of the result.

    Args:
        job: what is pruned, by which methods.
        read_tokens: gives the calibration windows and `config.further` ones after them, int64 `(samples, seqlen)`; its time
            counts as calibration.
    """
    config, record = job.config, job.record
    found = Found()
    with record.stage("calibrate", job.device):
        drawn = read_tokens()
        whole = not job.methods.permutation.local or config.calibration.statistics == "dense"
        dense = calibrate(job, drawn) if whole else None
    if dense is not None:
        orders = found_orders(job, drawn, dense)
        factors = dense.factors if config.calibration.statistics == "dense" else None
        found = Found(factors, orders, found_masks(job, drawn, dense, orders))
    del dense  # the states that were learned from: pruning needs none of them
    with record.stage("prune", job.device):
        pruned = prune(job, drawn, found)
        if pruned.violations:
            log.warning("the pruned model is not N:M: %d groups of M hold more than N nonzeros", pruned.violations)
        record.kept(PERMUTATIONS, lambda: pruned.orders, save_tensors, load_orders)
        record.kept(MASKS, lambda: pruned.masks, save_masks, load_masks)
        figures = _figures(job, pruned)
        if figures["sparsity"]["weights_kept"]:
            _keep_weights(job)
        record.metrics |= figures
    return pruned


def _keep_weights(job: Job) -> None:
    """Write the changed weights of each layer."""
    for index, groups in by_layer(job.loaded.model, job.groups, "keep"):
        paths = [path for group in groups for path in group.members]
        if paths:
            weights = {path: linear_at(job.loaded.model, path).weight.data for path in paths}
            job.record.keep(layer_file(WEIGHTS, index), weights, save_tensors)


def _figures(job: Job, pruned: PrunedModel) -> dict[str, Any]:
    """Return the figures of a pruned model in `metrics.json`, before it is evaluated."""
    groups = channel_groups(job.loaded.model)
    patterns = differing_patterns(groups, job.groups)
    weights = kept = 0
    for mask in pruned.masks.values():
        weights, kept = weights + mask.numel(), kept + int(mask.sum())
    return {
        "compute_dtype": str(job.products).removeprefix("torch."),
        "sparsity": {
            "pattern": str(job.config.pattern),
            **({"patterns": patterns} if patterns else {}),
            "fraction": (weights - kept) / weights,
            "of_model": (weights - kept) / sum(group.channels * sum(group.rows) for group in groups),
            "violations": pruned.violations,
            "weights_changed": job.methods.change_weights,
            "weights_kept": job.methods.change_weights and job.config.save_weights,
        },
        "retained_saliency": pruned.retained,
        "output_error": pruned.output_error,
        "moved_channels": pruned.moved,
    }
