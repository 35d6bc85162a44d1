"""The view of what helps to learn a better order: each row names what differs from the settings of a job that says nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from permllm.config import flatten
from permllm.pruning.composition import HYDRA_DEFAULTS, conf_directory, register_resolvers
from permllm.runs.names import RECORDS
from permllm.runs.read import Run, collect
from permllm.runs.render import as_text
from scripts.views.tables import processor

_GROUPS = ("pruner", "permutation", "mask", "reconstruction", "temperature")
# Single settings that make a result; of a group that is named above, all.
_SETTINGS = ("block_size", "compute_dtype", "calibration.samples", "calibration.seqlen", "calibration.statistics")
# Settings that follow from others, or say nothing about a result.
_LEFT_OUT = ("block_size", "temperature", "mask_temperature", "compile", "path", "target", "_target_", "uses")


def ablation(folder: Path, records: str = RECORDS) -> list[str]:
    """Worst perplexity first, mean and standard deviation over seeds.

    Args:
        folder: of the document.
        records: the file of the runs.
    """
    runs = collect([folder / records], apart=True).runs
    lines = pd.DataFrame([_line(run) for run in runs])
    keys = ["pruner", "permutation", "reconstruction", "settings", "processor"]
    groups = lines.groupby(keys, sort=False)
    table = groups.agg(
        mean=("perplexity", "mean"),
        perplexity=("perplexity", lambda values: _spread(values, 1)),
        loss=("loss", lambda values: _spread(values.dropna(), 3)),
        seconds=("seconds", lambda values: f"{values.mean():.0f}"),
        records=("record", lambda names: ", ".join(f"`{name}`" for name in names)),
    )
    table = table.reset_index().sort_values("mean", ascending=False, kind="stable").rename(columns={"loss": "final loss"})
    for name in keys[:3]:
        table[name] = "`" + table[name] + "`"
    shown = table[[*keys[:4], "perplexity", "final loss", "seconds", "processor", "records"]]
    note = f"Dense: {lines['dense'].iloc[0]:.1f}. Seconds of calibration, learning and pruning on two cores."
    return [*as_text(shown, "md").splitlines(), "", note]


def _line(run: Run) -> dict[str, Any]:
    config, metrics = run.config, run.metrics
    said = ", ".join(f"{key.removeprefix('permutation.')}={value}" for key, value in _differing(run))
    order = Path(config["permutation"].get("path", "")).name.rsplit("-", 1)[-1]
    if order:
        said = f"the order of `{order}`" + (f", {said}" if said else "")
    measured = [entry["measured_loss"] for entry in run.history if entry["measured_loss"] is not None]
    found = {group: config.get(group, {}).get("name", "none") for group in _GROUPS}
    return found | {
        "settings": said,
        "perplexity": _perplexity(metrics, "sparse"),
        "dense": _perplexity(metrics, "dense"),
        "loss": min(measured, default=None),
        "seconds": sum(value for name, value in metrics["seconds"].items() if not name.startswith(("evaluate", "load"))),
        "processor": processor(run.environment["hardware"]).replace("(R)", "").replace(" Processor", ""),
        "record": run.directory.name.rsplit("-", 1)[-1],
    }


def _differing(run: Run) -> Iterator[tuple[str, Any]]:
    """What sets a run apart from `python run.py` with its pruner and reconstruction, on a device that multiplies bfloat16."""
    options = {group: run.config[group]["name"] for group in ("pruner", "mask", "reconstruction")}
    usual = _usual(**options) | {"mask.name": "pruner"}
    for key, value in _settings(run.config | {"compute_dtype": run.metrics.get("compute_dtype", "float32")}).items():
        group, _, rest = key.partition(".")
        if value != usual.get(key) and not (rest == "name" and group not in ("temperature", "mask")):
            yield group if rest == "name" else key, value


@cache
def _usual(**options: str) -> dict[str, Any]:
    register_resolvers()
    with initialize_config_dir(str(conf_directory()), **HYDRA_DEFAULTS):
        composed = compose("config", overrides=[f"{group}={option}" for group, option in options.items()])
    config: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    return _settings(config | {"compute_dtype": "bfloat16"})


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a result, flat; settings of learning only where something is learned."""
    learned = "epochs" in config["permutation"]
    flat = flatten(config)
    found = {key: flat.get(key) for key in _SETTINGS if learned or key != "block_size"}
    for group in _GROUPS:
        if group != "temperature" or learned:
            found |= {f"{group}.{key}": value for key, value in config[group].items()}
    if learned and found["permutation.loss"] is None:
        found["permutation.loss"] = "kl" if found["permutation.layers_per_stage"] == "all" else "cosine"
    return {key: value for key, value in found.items() if "." not in key or key.split(".")[1] not in _LEFT_OUT}


def _perplexity(metrics: dict[str, Any], which: str) -> float:
    """The geometric mean over the texts."""
    found = [float(result["value"]) for result in metrics["perplexity"][which].values()]
    return found[0] if len(found) == 1 else math.exp(statistics.fmean(map(math.log, found)))


def _spread(values: pd.Series, digits: int) -> str:
    if values.empty:
        return ""
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} ± {values.std():.{digits}f}" if len(values) > 1 else mean
