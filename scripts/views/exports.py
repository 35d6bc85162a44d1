"""Views of exports: what folding costs, stock transformers, and proofs, from what the commands wrote as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from permllm.runs.schema import Object

from permllm.runs.files import read_json
from permllm.runs.names import RECORDS
from permllm.runs.read import Run, collect
from permllm.runs.render import as_text

# The default recipe.
_RECIPE = {
    "straight_through": "swap",
    "learning_rate": 0.01,
    "epochs": 3,
    "init": "heuristic",
    "margin": 0.05,
    "noise": 0.02,
    "layers_per_stage": "all",
}
_TEMPERATURE = ("linear", 1.0, 0.1)


def orders(folder: Path, records: str = RECORDS) -> list[str]:
    """Perplexity of the default recipe and the heuristic, free and foldable, mean and deviation over seeds."""
    runs = [run for run in collect([folder / records], apart=True).runs if _default(run)]
    lines = []
    for run in runs:
        permutation, metrics = run.config["permutation"], run.metrics
        constraint = "-" if permutation["name"] == "none" else permutation.get("constraint", "free")
        ((dense, sparse),) = zip(*(metrics["perplexity"][which].values() for which in ("dense", "sparse")), strict=True)
        lines.append((f"`{permutation['name']}`", constraint, sparse["value"], dense["value"]))
    found = pd.DataFrame(lines, columns=["permutation", "constraint", "perplexity", "dense"])
    table = found.groupby(["permutation", "constraint"])["perplexity"].agg(["mean", "std", "size"]).reset_index()
    table = table.sort_values("mean", ascending=False)
    spread = ["" if math.isnan(deviation) else f" ± {deviation:.1f}" for deviation in table["std"]]
    table["perplexity (WikiText-2 test, first 32 windows of 256)"] = table["mean"].map("{:.1f}".format) + spread
    table["seeds"] = table["size"].map(str)
    shown = as_text(table.drop(columns=["mean", "std", "size"]), "md").splitlines()
    return [*shown, "", f"Dense: {found['dense'].iloc[-1]:.1f}."]


def _default(run: Run) -> bool:
    """A run of Wanda whose other settings are the default recipe's."""
    config, permutation = run.config, run.config["permutation"]
    if config["pruner"]["name"] != "wanda" or run.metrics.get("compute_dtype") != "bfloat16":
        return False
    if config["reconstruction"]["name"] != "none" or config["calibration"]["samples"] != 128:
        return False
    if config["mask"]["name"] != "pruner":
        return False
    if permutation["name"] in ("none", "heuristic"):
        return True
    temperature = config["temperature"]
    return (
        permutation["name"] == "lcp"
        and all(permutation.get(key) == value for key, value in _RECIPE.items())
        and config["block_size"] == 64
        and permutation.get("loss") in (None, "kl")
        and (temperature["name"], temperature["start"], temperature["end"]) == _TEMPERATURE
    )


def stock(folder: Path, files: str = "stock*.json") -> list[str]:
    """One line a file of `permllm verify DIR --stock RUN`, or of version 0.1, which wrote that part alone."""
    return _table(
        {
            "run": f"`{found['run']}`",
            "class": f"`{found['class'].rsplit('.', 1)[-1]}`",
            "perplexity of the run": f"{found['perplexity_of_the_run']:.3f}",
            "with stock transformers": f"{found['perplexity_stock']:.3f}",
            "relative difference": f"{found['relative_difference']:.1e}",
        }
        for _, report in _json(folder, files)
        for found in [report.get("stock", report)]
    )


def verify(folder: Path, files: str = "verify-*.json") -> list[str]:
    """One line a file of `permllm verify`."""
    lines = []
    for name, report in _json(folder, files):
        layers = pd.DataFrame(report["layers"])
        sizes = layers["shape"].map(math.prod)
        line = {"checkpoint": name.removeprefix("verify-"), "weights": f"{len(layers)}"}
        line["zeros"] = f"{(layers['zeros'] * sizes).sum() / sizes.sum():.2%}"
        for title, key in (("violations", "violations"), ("-0.0", "negative_zeros"), ("not finite", "nan")):
            line[title] = f"{layers[key].fillna(0).sum():.0f}"
        line["MB on disk"] = f"{report['bytes'] / 1e6:.1f}"
        difference = report["difference"]
        line["relative difference of logits"] = f"{difference['relative']:.1e}" if difference else ""
        lines.append(line | {"verdict": "passed" if report["passed"] else "failed"})
    return _table(lines)


def _table(lines: Any) -> list[str]:
    return as_text(pd.DataFrame(list(lines)), "md").splitlines()


def _json(folder: Path, pattern: str) -> Iterator[tuple[str, Any]]:
    """Name and content of each file."""
    for file in sorted(folder.glob(pattern)):
        yield file.stem, read_json(file, Object)
