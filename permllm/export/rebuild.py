"""The pruned model of a run, from the dense one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from permllm.config import NMPattern
from permllm.errors import DataError
from permllm.models.families import channel_groups, linear_at
from permllm.models.offload import masked, placement_of
from permllm.models.selection import recorded_groups
from permllm.runs.files import read_json
from permllm.runs.names import METRICS, WEIGHTS
from permllm.runs.pruned import Pruned
from permllm.runs.schema import Metrics


def apply_record(model: nn.Module, identity: str, directory: Path) -> None:
    """Turn the dense model into the pruned one of a run, in place.

    Args:
        model: the dense model that the run started from.
        identity: of that model (`LoadedModel.identity`).
        directory: of a run that has been pruned.

    Raises:
        DataError: the record belongs to another model, is not whole, or the pruner changed weights that were not kept
            (`save_weights=false`).
    """
    metrics = read_json(directory / METRICS, Metrics)
    if "model" not in metrics or "sparsity" not in metrics:
        raise DataError(f"{directory} holds no pruned model")
    if metrics["model"] != identity:
        raise DataError(f"{directory} was pruned from {metrics['model']}, and this model is {identity}")
    sparsity = metrics["sparsity"]
    pattern = NMPattern.parse(sparsity["pattern"])
    groups = recorded_groups(channel_groups(model), pattern, sparsity.get("patterns", {}))
    kept = Pruned(directory, metrics, groups, pattern)
    placement = placement_of(model)
    for group in groups:
        with placement.layer(group.layer):
            for path in group.members:
                linear = linear_at(model, path)
                dense = linear.weight.data
                if kept.weights_changed:
                    placement.replace(linear, kept.weight(path, dense))
                    placement.lies_in(directory / WEIGHTS, {linear: path})
                else:
                    placement.replace(linear, masked(kept.mask(path), dense), partial(kept.checked_mask, path))
