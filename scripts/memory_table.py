"""Tables of a GPU's memory and minutes, estimated as `plan=true` does."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from permllm.models.load import meta_model
from permllm.planning.footprint import Footprint
from permllm.planning.placement import placements
from permllm.pruning.methods import checked_groups, methods_of
from permllm.report.render import as_text
from permllm.settings.composition import composed
from permllm.settings.config import read_config

_METHODS = [
    "method=wanda",
    "method=sparsegpt",
    "permutation=heuristic",
    "permutation=lcp",
    "method=lcp-folded",
    "method=masks-lowrank",
    "method=masks",
    "method=masks mask.layers_per_stage=4",
    "reconstruction=distill",
]


def memory(folder: Path, models: str) -> str:
    """Return a table in GB: memory with the layers on the device / with the layers on the host.

    Args:
        folder: folder of the document; not used.
        models: names of models, separated by commas.
    """
    names = models.split(",")
    rows = [[f"`{words}`", *(gigabytes(name, words) for name in names)] for words in _METHODS]
    columns = ["GB on the device / with the layers on the host", *names]
    return as_text(pd.DataFrame(rows, columns=columns), "md")


def gigabytes(name: str, words: str) -> str:
    """Return GB of a GPU for a job, and behind a slash GB with the layers on the host.

    Args:
        name: option of the group `model`.
        words: further words that are typed after `run.py`, with spaces.
    """
    job = _footprint(name, words)
    places = (place for place in placements(job) if place in ("device", "host"))
    return " / ".join(f"{job.needs(place).device / 1e9:.1f}" for place in places)


def _footprint(name: str, words: str) -> Footprint:
    """Return the estimates of a job on a GPU."""
    config = read_config(composed([f"model={name}", *words.split()]))
    model = _shape(name)
    methods = methods_of(config)
    groups = checked_groups(config, methods, model)
    return Footprint(config, model, methods, groups, torch.device("cuda"))


@cache
def _shape(name: str) -> PreTrainedModel:
    """Return a model without weights."""
    return meta_model(read_config(composed([f"model={name}"])).model)
