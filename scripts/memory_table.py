"""Table of a GPU's memory by method and model, estimated by `plan=true`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from permllm.config import read_config
from permllm.models.load import meta_model
from permllm.pruning.composition import composed
from permllm.pruning.footprint import Footprint
from permllm.pruning.methods import methods_of
from permllm.pruning.placement import placements
from permllm.runs.render import as_text

_METHODS = [
    "method=wanda",
    "method=sparsegpt",
    "permutation=heuristic",
    "permutation=lcp",
    "method=order-folded",
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
    shapes = {name: meta_model(read_config(composed([f"model={name}"])).model) for name in names}
    rows = []
    for words in _METHODS:
        row = [f"`{words}`"]
        for name in names:
            config = read_config(composed([f"model={name}", *words.split()]))
            job = Footprint(config, shapes[name], methods_of(config), torch.device("cuda"))
            row.append(
                " / ".join(
                    f"{job.needs(place).device / 1e9:.1f}"
                    for place in placements(job)
                    if place in ("device", "host")
                )
            )
        rows.append(row)
    return as_text(
        pd.DataFrame(rows, columns=["GB on the device / with the layers on the host", *names]), "md"
    )
