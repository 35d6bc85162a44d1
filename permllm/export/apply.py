"""Pruned model of a run, made of the dense model and the run's files."""

from functools import partial
from pathlib import Path

from torch import nn

from permllm.export.write import read_record
from permllm.models.families import channel_groups, linear_at
from permllm.models.offload import masked, placement_of
from permllm.models.selection import recorded_groups
from permllm.store.tensors import PrunedTensors


def apply_record(model: nn.Module, identity: str, directory: Path) -> None:
    """Turn the dense model into the pruned model of a run, in place.

    The identity is that of the dense model (`LoadedModel.identity`). Errors as in `PrunedTensors`.
    """
    metrics, _ = read_record(directory)
    groups = recorded_groups(channel_groups(model), metrics["sparsity"].get("patterns", {}))
    pruned = PrunedTensors(directory, metrics, identity)
    placement = placement_of(model)
    for group in groups:
        with placement.layer(group.layer):
            for path in group.members:
                linear = linear_at(model, path)
                dense = linear.weight.data
                if pruned.weights_changed:
                    placement.replace(linear, pruned.weight(path, dense))
                    placement.read_from(pruned.weight_files[path], {linear: path})
                else:
                    read = partial(pruned.masks.__getitem__, path)
                    placement.replace(linear, masked(read(), dense), read)
