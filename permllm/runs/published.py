"""The paper's numbers beside ours (PermLLM, tables 1 to 8; `published.csv` holds each of them)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError
from permllm.runs.evaluations import all_of, counted_tasks
from permllm.runs.read import Run
from permllm.runs.table import LEARNED_TOO, Row

_FILE = Path(__file__).parent / "published.csv"
_METHODS = {
    ("sparsegpt", "none"): "sparsegpt",
    ("wanda", "none"): "wanda",
    ("wanda", "heuristic"): "wanda+cp",
    ("wanda", "lcp"): "permllm-wanda",
    ("ria", "none"): "ria",
    ("ria", "heuristic"): "ria+cp",
    ("ria", "lcp"): "permllm-ria",
}
# The settings that the paper's tables vary, and where ours have them.
_SETTINGS = {
    "sinkhorn_iterations": ("permutation", "sinkhorn_iterations"),
    "calibration": ("calibration", "dataset"),
    "block_size": ("block_size",),
    "last_layers": ("permutation", "last_layers"),
}
# What the paper has where a table does not vary it.
_USUAL = {"sinkhorn_iterations": 5, "calibration": "c4", "block_size": 64, "last_layers": None}


@dataclass(frozen=True)
class Published:
    """A number of the paper."""

    table: str
    model: str
    sparsity: str
    method: str
    setting: str
    metric: str
    value: float


def published(table: str) -> list[Published]:
    """The numbers of one table.

    Args:
        table: `table6`, or `6`.

    Raises:
        ConfigError: there is no such table; the message lists those there are.
    """
    with open(_FILE, encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    rows = [_published(line) for line in lines]
    tables = sorted({row.table for row in rows})
    wanted = table.removeprefix("table")
    if wanted not in tables:
        raise ConfigError(f"--paper {table}: there is no such table; valid are {', '.join(f'table{name}' for name in tables)}")
    return [row for row in rows if row.table == wanted]


def _published(line: dict[str, str]) -> Published:
    value = float(line["value"])
    return Published(line["table"], line["model"], line["sparsity"], line["method"], line["setting"], line["metric"], value)


def beside(table: str | None, runs: Iterable[Run]) -> Comparison | None:
    """The paper's numbers for some runs; None where no table is asked for. Errors as `published` and `Comparison`."""
    return Comparison(published(table), sorted({run.config["model"]["name"] for run in runs})) if table else None


class Comparison:
    """Finds the paper's number for a row of ours.

    Args:
        rows: of one table of the paper.
        models: ours; a single one may be one that the table does not have: the numbers are those of another then, as `note`
            says, and any perplexity of ours stands beside its perplexity on WikiText-2.
        preferred: the paper's model to take where ours is not in the table.

    Raises:
        ConfigError: of several models, the table does not have one.
    """

    def __init__(self, rows: list[Published], models: str | Sequence[str], preferred: str = "llama-2-7b") -> None:
        ours = [models] if isinstance(models, str) else list(models)
        theirs = list(dict.fromkeys(row.model for row in rows))
        missing = [model for model in ours if model not in theirs]
        self.same_model = not missing
        self.note = ""
        self._stand_in = ""
        if missing:
            if len(ours) > 1:
                raise ConfigError(
                    f"--paper: the table has {', '.join(theirs)}, not {', '.join(missing)}; give runs of one model or of these"
                )
            self._stand_in = preferred if preferred in theirs else theirs[0]
            self.note = (
                f"The paper's numbers are those of {self._stand_in} on its own protocol, ours of {ours[0]}: "
                "compare the order of the rows, not the values."
            )
        self._only = self._stand_in or (ours[0] if len(ours) == 1 else "")
        self.heading = f"paper, {self._only}" if self._only else "paper"
        self._values = {(row.model, row.sparsity, row.method, row.setting, row.metric): row.value for row in rows}
        self._varied = {row.setting.split("=")[0] for row in rows if "=" in row.setting}  # of table 3 it is a layer

    def value(self, row: Row, measure: str) -> float | None:
        """The paper's number for one measure of ours, in our units (accuracies as shares); None where it has none."""
        config = row.runs[0].config
        method = _METHODS.get((config["pruner"]["name"], _permutation(config["permutation"]["name"])))
        metric = self._metric(measure)
        limited = row.measures[measure].limited if measure in row.measures else False
        if method is None or metric is None or not self._as_in_the_paper(config) or (limited and not self._stand_in):
            return None
        if metric == "average_acc" and not self._averages_what_it_does(row):
            return None
        for setting in (*self._settings_of(config), ""):
            model = self._stand_in or config["model"]["name"]
            found = self._values.get((model, config["sparsity"], method, setting, metric))
            if found is not None:
                return found / 100 if metric.endswith("_acc") else found
        return None

    def dense(self, measure: str) -> float | None:
        """The paper's number of the dense model, where there is one model."""
        metric = self._metric(measure)
        for (model, _, method, _, name), value in self._values.items():
            if method == "dense" and (model, name) == (self._only, metric):
                return value / 100 if name.endswith("_acc") else value
        return None

    def _as_in_the_paper(self, config: dict[str, Any]) -> bool:
        """Whether nothing that this table does not vary is other than in the paper."""
        if any((config.get(group) or {}).get("name", usual) != usual for group, usual in LEARNED_TOO.items()):
            return False
        if config.get("keep_dense") or config.get("sparsity_of"):
            return False
        if config["permutation"].get("constraint", "free") != "free":
            return False
        learned = _permutation(config["permutation"]["name"]) == "lcp"
        for name, usual in _USUAL.items():
            # Another model has other texts anyway, as the note says.
            matters = not self._stand_in if name == "calibration" else learned
            if name not in self._varied and matters and _setting(config, name) != usual:
                return False
        return True

    def _settings_of(self, config: dict[str, Any]) -> list[str]:
        values = {name: _setting(config, name) for name in self._varied}
        return [f"{name}={'all' if name == 'last_layers' and v is None else v}" for name, v in values.items()]

    def _metric(self, measure: str) -> str | None:
        if "perplexity" in measure and (self._stand_in or measure == "wikitext2 perplexity (window 2048)"):
            return "wikitext2_ppl"
        match = re.fullmatch(r"(\w+) acc", measure)
        return f"{match[1]}_acc" if match else None

    def _averages_what_it_does(self, row: Row) -> bool:
        """Whether the mean accuracy is over the tasks of the paper's."""
        theirs = {metric.removesuffix("_acc") for *_, metric in self._values if metric.endswith("_acc")} - {"average"}
        measured = [all_of(run.metrics) for run in row.runs]
        counted = [[counted_tasks(entry.get("zero_shot", {}).get("sparse", {})) for entry in entries] for entries in measured]
        return all(any(set(tasks) == theirs for tasks in of_run) for of_run in counted)


def _setting(config: dict[str, Any], name: str) -> Any:
    value: Any = config
    for key in _SETTINGS[name]:
        value = value.get(key, _USUAL[name]) if isinstance(value, dict) else None
    return value


def _permutation(name: str) -> str:
    return "lcp" if name.startswith("lcp") else name
