"""The paper's numbers beside ours (PermLLM, tables 1 to 8; `published.csv` holds each of them)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from permllm.config import flatten
from permllm.errors import ConfigError
from permllm.runs.measures import Measure, method_of

_FILE = Path(__file__).parent / "published.csv"
# Model of the paper to take where a table does not have ours.
_STAND_IN = "llama-2-7b"
# Settings that the paper's tables vary, where ours have them, and the paper's value where a table
# does not vary them.
_SETTINGS: dict[str, tuple[str, Any]] = {
    "sinkhorn_iterations": ("permutation.sinkhorn_iterations", 5),
    "calibration": ("calibration.dataset", "c4"),
    "block_size": ("block_size", 64),
    "last_layers": ("permutation.last_layers", None),
}


def published(table: str) -> list[Any]:
    """Return the numbers of one table, `table6` or `6`, by the columns of the file.

    Raises ConfigError for no such table.
    """
    rows = pd.read_csv(_FILE, dtype={"table": str}, keep_default_na=False)
    found = rows[rows["table"] == table.removeprefix("table")]
    if found.empty:
        valid = ", ".join(f"table{name}" for name in sorted(rows["table"].unique()))
        raise ConfigError(f"--paper {table}: there is no such table; valid are {valid}")
    return [*found.itertuples(index=False, name="Published")]


class Comparison:
    """Finder of the paper's number for a run of ours.

    Args:
        rows: of one table of the paper.
        models: ours. A single one may be a model that the table does not have: the numbers are
            those of another model then, as `note` says, and any perplexity of ours stands beside
            the paper's perplexity on WikiText-2.

    Raises:
        ConfigError: the table does not have one of several models.
    """

    def __init__(self, rows: list[Any], *models: str) -> None:
        theirs = list(dict.fromkeys(row.model for row in rows))
        missing = [model for model in models if model not in theirs]
        if missing and len(models) > 1:
            there = f"the table has {', '.join(theirs)}, not {', '.join(missing)}"
            raise ConfigError(f"--paper: {there}; give runs of one model or of these")
        self.same_model, self.note = not missing, ""
        self._only = models[0] if len(models) == 1 else ""
        if missing:
            self._only = _STAND_IN if _STAND_IN in theirs else theirs[0]
            numbers = f"those of {self._only} on its own protocol, ours of {missing[0]}"
            compare = "compare the order of the rows, not the values"
            self.note = f"The paper's numbers are {numbers}: {compare}."
        self.heading = f"paper, {self._only}" if self._only else "paper"
        self._values, self._varied, self._tasks = {}, list[str](), set[str]()
        for row in rows:
            share = 100 if "_acc" in row.metric else 1
            key = (row.model, row.sparsity, row.method, row.setting, row.metric)
            self._values[key] = row.value / share
            name, varied, _ = row.setting.partition("=")
            if varied and name not in self._varied:
                self._varied.append(name)
            if row.metric.endswith("_acc") and row.metric != "average_acc":
                self._tasks.add(row.metric.removesuffix("_acc"))

    def value(
        self, config: Mapping[str, Any], measure: str, ours: Measure | None = None
    ) -> float | None:
        """Return the paper's number for a measure of a run of ours, accuracies as shares, or None.

        Args:
            config: settings of the run.
            measure: name of its column.
            ours: the run's own number, if it has one.
        """
        metric = self._metric(measure)
        if metric is None or not self._as_in_the_paper(config):
            return None
        if ours and ours.limited and self.same_model:
            return None
        if ours and ours.tasks and set(ours.tasks) != self._tasks:
            return None
        model = config["model"]["name"] if self.same_model else self._only
        pruner, permutation = config["pruner"]["name"], config["permutation"]["name"]
        ending = {"none": "", "heuristic": "+cp"}.get(permutation, f"+{permutation}")
        method = f"permllm-{pruner}" if permutation.startswith("lcp") else f"{pruner}{ending}"
        key = (model, config["sparsity"], method)
        settings = [f"{name}={_value(config, name)}" for name in self._varied]
        settings = [text.replace("last_layers=None", "last_layers=all") for text in settings]
        found = (self._values.get((*key, setting, metric)) for setting in (*settings, ""))
        return next((value for value in found if value is not None), None)

    def dense(self, measure: str) -> float | None:
        """Return the paper's number of the dense model; None where there are several models."""
        wanted = (self._only, "dense", self._metric(measure))
        for (model, _, method, _, metric), value in self._values.items():
            if (model, method, metric) == wanted:
                return float(value)
        return None

    def _as_in_the_paper(self, config: Mapping[str, Any]) -> bool:
        """Tell whether nothing that this table does not vary differs from the paper."""
        name = config["permutation"]["name"]
        foldable = config["permutation"].get("constraint", "free") != "free"
        dense = config.get("keep_dense") or config.get("sparsity_of")
        if method_of(config) != name or foldable or dense:
            return False
        # Another model has other texts anyway, as the note says.
        matter = ["calibration"] if self.same_model else []
        if name.startswith("lcp"):
            matter += [name for name in _SETTINGS if name != "calibration"]
        fixed = [name for name in matter if name not in self._varied]
        return all(_value(config, name) == _SETTINGS[name][1] for name in fixed)

    def _metric(self, measure: str) -> str | None:
        same = not self.same_model or measure == "wikitext2 perplexity (window 2048)"
        if "perplexity" in measure and same:
            return "wikitext2_ppl"
        match = re.fullmatch(r"(\w+) acc", measure)
        return f"{match[1]}_acc" if match else None


def _value(config: Mapping[str, Any], name: str) -> Any:
    return flatten(dict(config)).get(*_SETTINGS[name])
