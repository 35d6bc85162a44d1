"""Masks and permutations of a run as a folder without weights, and the model that they make.

A run that changed no weights is determined by the dense model and its masks. The folder has the
files of masks and permutations of the run, its settings and results, and a card.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from permllm.errors import ConfigError, DataError
from permllm.export.card import model_card
from permllm.export.write import MASKS_ALONE, dense_model, finished_record, new_export, read_record
from permllm.models.checkpoint import read_weights
from permllm.models.families import channel_groups, linear_at
from permllm.models.load import dense_folder, folder_identity
from permllm.models.offload import masked, placement_of
from permllm.models.selection import recorded_groups
from permllm.settings.config import identity_of
from permllm.store.files import MASKS, PERMUTATIONS, SUMMARY, write_json, write_text
from permllm.store.tensors import PrunedTensors

_FILES = (MASKS, PERMUTATIONS)
# Metrics that the model and the card need.
_METRICS = (
    *("status", "name", "config_hash", "model", "sparsity"),
    *("evaluation", "perplexity", "tasks", "evaluated_texts"),
)
# Settings of the machine of the run, and the acceptance of terms, which each user gives.
_ANYWHERE = {"path": None, "device": "auto", "placement": "auto", "accept_terms": False}


def write_masks(directory: Path, target: Path) -> dict[str, Any]:
    """Write the masks and permutations of a run into a new or empty folder, and return its summary.

    Raises:
        ConfigError: the run is not finished or has changed weights, or the target is not empty.
        DataError: a file is missing or damaged.
    """
    metrics, config = finished_record(directory)
    sparsity = metrics["sparsity"]
    if sparsity["weights_changed"]:
        raise ConfigError(
            f"--form masks: {directory} has changed weights, and masks need those of the dense "
            "model; take --form folded or gathered"
        )
    PrunedTensors(directory, metrics, metrics["model"])  # checks the files
    with new_export(target) as folder:
        for name in _FILES:
            shutil.copyfile(directory / name, folder / name)
        summary = {
            "form": MASKS_ALONE,
            "sparsity": sparsity["pattern"],
            "bytes": sum((folder / name).stat().st_size for name in _FILES),
            "sha256": {name: metrics["sha256"][name] for name in _FILES},
        }
        if "patterns" in sparsity:
            summary["patterns"] = sparsity["patterns"]
        summary["metrics"] = {key: metrics[key] for key in _METRICS if key in metrics}
        summary["metrics"]["sha256"] = summary["sha256"]
        summary["settings"] = identity_of(config) | {"model": config["model"] | _ANYWHERE}
        write_json(folder / SUMMARY, summary)
        write_text(folder / "README.md", model_card(config, metrics, summary))
    return summary


def load_masked(
    folder: Path,
    dtype: torch.dtype | str | None,
    dense: str | Path | PreTrainedModel | None = None,
    accept_terms: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Apply the masks of a folder to their dense model; arguments and errors as `permllm.load`."""
    metrics, config = read_record(folder)
    if isinstance(dense, PreTrainedModel):
        if dtype or options:
            raise ConfigError("dense: a loaded model keeps its dtype and takes no options")
        apply_record(dense, metrics["model"], folder)
        return dense
    settings = dense_model(config, dense, accept_terms)
    source = dense_folder(settings)
    if source is None:
        raise ConfigError(f"{folder} has masks of a random model: expected a model with files")
    model = read_weights(source, dtype or settings.dtype, torch.device("cpu"), **options)
    apply_record(model, folder_identity(settings, source), folder)
    return model


def apply_record(model: nn.Module, identity: str, directory: Path) -> None:
    """Turn the dense model into the pruned model of a run, or of a folder with its masks, in place.

    The identity is that of the dense model (`LoadedModel.identity`).
    Raises DataError as `PrunedTensors`, or if the model has other linears.
    """
    metrics, _ = read_record(directory)
    groups = recorded_groups(channel_groups(model), metrics["sparsity"].get("patterns", {}))
    pruned = PrunedTensors(directory, metrics, identity)
    shapes = {
        path: linear_at(model, path).weight.shape for group in groups for path in group.members
    }
    if shapes != pruned.masks.shapes():
        raise DataError(f"{directory} has masks of other linears than this model")
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
