"""The stages that make a pruned model out of a dense one, whoever asks for them: calibrate, permute, learn masks, prune."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from permllm.models.families import channel_groups
from permllm.models.selection import differing_patterns
from permllm.pruning.layerwise import Found, PrunedModel, prune
from permllm.pruning.methods import Job
from permllm.pruning.ordering import calibrate, found_masks, found_orders, target_of_all

log = logging.getLogger(__name__)


def prune_model(
    job: Job, read_tokens: Callable[[], Tensor], keep: Callable[[PrunedModel], None] = lambda _: None
) -> PrunedModel:
    """Prune the job's model in place. Seconds and peaks of the stages go into its record, and figures of the result.

    Args:
        job: what is pruned, by which methods.
        read_tokens: gives the calibration windows and `config.further` ones after them, int64 `(samples, seqlen)`; its time
            counts as calibration.
        keep: writes what was found; its time counts as pruning.
    """
    config, record = job.config, job.record
    dense = None
    with record.stage("calibrate", job.device):
        drawn = read_tokens()
        if not job.methods.permutation.local or config.calibration.statistics == "dense":
            dense = calibrate(config, job.loaded, drawn[: config.calibration.samples], job.methods.pruner, job.products)
            dense.target = target_of_all(job, drawn, dense.target)
    found = Found()
    if dense is not None:
        orders = found_orders(job, drawn, dense)
        factors = dense.factors if config.calibration.statistics == "dense" else None
        found = Found(factors, orders, found_masks(job, drawn, dense, orders))
    del dense  # the states that were learned from: pruning needs none of them
    with record.stage("prune", job.device):
        pruned = prune(job, drawn, found)
        if pruned.violations:
            log.warning("the pruned model is not N:M: %d groups of M hold more than N nonzeros", pruned.violations)
        keep(pruned)
    return pruned


def figures(job: Job, pruned: PrunedModel) -> dict[str, Any]:
    """What `metrics.json` says of a model that was pruned, before it is evaluated."""
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
