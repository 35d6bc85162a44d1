"""The paper's numbers beside ours (PermLLM, tables 1 to 8; `published.csv` holds each of them)."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError
from permllm.runs.frame import METHODS
from permllm.runs.measures import Measure

_FILE = Path(__file__).parent / "published.csv"
# Settings that the paper's tables vary, where ours have them, and the paper's value where a table does not vary them.
_SETTINGS: dict[str, tuple[tuple[str, ...], Any]] = {
    "sinkhorn_iterations": (("permutation", "sinkhorn_iterations"), 5),
    "calibration": (("calibration", "dataset"), "c4"),
    "block_size": (("block_size",), 64),
    "last_layers": (("permutation", "last_layers"), None),
}


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
    """Return the numbers of one table.

    Args:
        table: `table6`, or `6`.

    Raises:
        ConfigError: there is no such table.
    """
    with open(_FILE, encoding="utf-8", newline="") as stream:
        rows = [Published(**line | {"value": float(line["value"])}) for line in csv.DictReader(stream)]  # type: ignore[arg-type]
    tables = sorted({row.table for row in rows})
    wanted = table.removeprefix("table")
    if wanted not in tables:
        raise ConfigError(f"--paper {table}: there is no such table; valid are {', '.join(f'table{name}' for name in tables)}")
    return [row for row in rows if row.table == wanted]


class Comparison:
    """Finder of the paper's number for a row of ours.

    Args:
        rows: of one table of the paper.
        models: ours. A single one may be a model that the table does not have: the numbers are those of another model then, as
            `note` says, and any perplexity of ours stands beside the paper's perplexity on WikiText-2.
        preferred: model of the paper to take where the table does not have ours.

    Raises:
        ConfigError: the table does not have one of several models.
    """

    def __init__(self, rows: list[Published], models: str | Sequence[str], preferred: str = "llama-2-7b") -> None:
        ours = [models] if isinstance(models, str) else list(models)
        theirs = list(dict.fromkeys(row.model for row in rows))
        missing = [model for model in ours if model not in theirs]
        if missing and len(ours) > 1:
            raise ConfigError(
                f"--paper: the table has {', '.join(theirs)}, not {', '.join(missing)}; give runs of one model or of these"
            )
        self.same_model = not missing
        self._stand_in = "" if self.same_model else preferred if preferred in theirs else theirs[0]
        self.note = (
            ""
            if self.same_model
            else (
                f"The paper's numbers are those of {self._stand_in} on its own protocol, ours of {ours[0]}: "
                "compare the order of the rows, not the values."
            )
        )
        self._only = self._stand_in or (ours[0] if len(ours) == 1 else "")
        self.heading = f"paper, {self._only}" if self._only else "paper"
        self._values = {(row.model, row.sparsity, row.method, row.setting, row.metric): row.value for row in rows}
        self._varied = {row.setting.split("=")[0] for row in rows if "=" in row.setting}  # of table 3 it is a layer

    def value(self, config: Mapping[str, Any], measure: str, ours: Measure | None = None) -> float | None:
        """Return the paper's number for one measure of a run of ours, accuracies as shares; None where it has none.

        Args:
            config: settings of the run.
            measure: name of its column.
            ours: the run's own number, if it has one.
        """
        metric = self._metric(measure)
        if metric is None or not self._as_in_the_paper(config):
            return None
        if ours and ((ours.limited and not self._stand_in) or (ours.tasks and set(ours.tasks) != self._tasks())):
            return None
        model = self._stand_in or config["model"]["name"]
        for setting in (*(self._setting(config, name) for name in self._varied), ""):
            found = self._values.get((model, config["sparsity"], _method(config), setting, metric))
            if found is not None:
                return found / 100 if metric.endswith("_acc") else found
        return None

    def dense(self, measure: str) -> float | None:
        """Return the paper's number of the dense model; None where there are several models."""
        metric = self._metric(measure)
        for (model, _, method, _, name), value in self._values.items():
            if method == "dense" and (model, name) == (self._only, metric):
                return value / 100 if name.endswith("_acc") else value
        return None

    def _as_in_the_paper(self, config: Mapping[str, Any]) -> bool:
        """Tell whether nothing that this table does not vary differs from the paper."""
        learned = {group: usual for group, usual in METHODS.items() if group != "permutation"}
        if any((config.get(group) or {}).get("name", usual) != usual for group, usual in learned.items()):
            return False
        if config.get("keep_dense") or config.get("sparsity_of"):
            return False
        if config["permutation"].get("constraint", "free") != "free":
            return False
        of_lcp = config["permutation"]["name"].startswith("lcp")
        for name, (_, usual) in _SETTINGS.items():
            # Another model has other texts anyway, as the note says.
            matters = not self._stand_in if name == "calibration" else of_lcp
            if name not in self._varied and matters and _value(config, name) != usual:
                return False
        return True

    def _setting(self, config: Mapping[str, Any], name: str) -> str:
        value = _value(config, name)
        return f"{name}={'all' if name == 'last_layers' and value is None else value}"

    def _metric(self, measure: str) -> str | None:
        if "perplexity" in measure and (self._stand_in or measure == "wikitext2 perplexity (window 2048)"):
            return "wikitext2_ppl"
        match = re.fullmatch(r"(\w+) acc", measure)
        return f"{match[1]}_acc" if match else None

    def _tasks(self) -> set[str]:
        """Return the tasks that the paper's average is over."""
        return {metric.removesuffix("_acc") for *_, metric in self._values if metric.endswith("_acc")} - {"average"}


def _method(config: Mapping[str, Any]) -> str:
    """Return the paper's name of a method; another one for what the paper does not have."""
    pruner, permutation = config["pruner"]["name"], config["permutation"]["name"]
    if permutation.startswith("lcp"):
        return f"permllm-{pruner}"
    return pruner + {"none": "", "heuristic": "+cp"}.get(permutation, f"+{permutation}")


def _value(config: Mapping[str, Any], name: str) -> Any:
    place, usual = _SETTINGS[name]
    value: Any = config
    for key in place:
        value = value.get(key, usual) if isinstance(value, Mapping) else None
    return value
