"""The paper's published numbers beside ours."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from permllm.errors import ConfigError
from permllm.report.metrics import FP8, Metric, method_of, setting_text
from permllm.settings.values import flatten

# The paper's tables.
TABLES = [f"table{number}" for number in range(1, 9)]
# Rows of the paper's tables. Columns of settings have our names; an empty text fits any value.
_FILE = Path(__file__).parent / "published.csv"
_TEXT = "calibration.dataset"
# Tasks of the paper's averages, as a fact of ours.
_TASKS = "of arc_challenge, arc_easy, hellaswag, openbookqa, rte"
# Model whose numbers are shown if a table of the paper does not have ours.
_STAND_IN = "llama-2-7b"


def published(table: str) -> pd.DataFrame:
    """Return the rows of the file for one table of the paper, one of `TABLES`."""
    rows = pd.read_csv(_FILE, keep_default_na=False, dtype=str).astype({"value": float})
    return rows[rows["table"] == table.removeprefix("table")]


class Comparison:
    """Finder of the paper's number for a run of ours.

    If the table does not have our single model, the numbers belong to another model. `notes` says
    so, and any perplexity of ours is compared with the paper's perplexity on WikiText-2.

    Args:
        name: name of a table of the paper.
        models: our models.

    Raises:
        ConfigError: our runs have several models, and the paper's table does not have all of them.
    """

    def __init__(self, name: str, models: Iterable[str]) -> None:
        rows = published(name)
        ours = sorted({*models})
        in_table = rows["model"].unique()
        missing = [model for model in ours if model not in in_table]
        if missing and len(ours) > 1:
            raise ConfigError(f"--paper: {name} does not have {', '.join(missing)}")
        self.same_model = not missing
        self.notes: list[str] = []
        self.heading = "paper"
        if len(ours) == 1:
            model = ours[0]
            if missing:
                model = _STAND_IN if _STAND_IN in in_table else in_table[0]
                self.notes.append(
                    f"The paper's numbers belong to {model} and the paper's protocol, ours to "
                    f"{ours[0]}. Compare the order of the rows, not the values."
                )
            rows = rows[rows["model"] == model].assign(model=ours[0])
            self.heading = f"paper, {model}"
        if missing and {*rows[_TEXT]} <= {"", "c4"}:  # the texts differ, as the note says
            rows[_TEXT] = ""
        self._rows = rows

    def value(
        self, config: Mapping[str, Any], metric: str, ours: Metric | None = None
    ) -> float | None:
        """Return the paper's number for a metric of a run; None: there is none."""
        settings = flatten(dict(config))
        permutation = settings["permutation.name"]
        of_part = ours is not None and ours.limited and self.same_model
        foldable = settings.get("permutation.constraint") == "foldable"
        other_method = method_of(config) != permutation or foldable or config.get("keep_dense")
        if other_method or of_part or _over_other_tasks(ours):
            return None
        settings["permutation.name"] = permutation.removesuffix("-paper")
        rows = self._rows[self._rows["model"] == settings["model.name"]]
        for name in settings.keys() & {*rows} - {"method"}:
            rows = rows[rows[name].isin(["", setting_text(settings[name])])]
        return self._number(rows, metric)

    def dense(self, metric: str, ours: Metric | None = None) -> float | None:
        """Return the paper's number of the dense model; None: there is none, or several models."""
        rows = self._rows[self._rows["method"] == "dense"]
        if _over_other_tasks(ours) or rows["model"].nunique() != 1:
            return None
        return self._number(rows, metric)

    def _number(self, rows: pd.DataFrame, metric: str) -> float | None:
        """Return the number of a metric in the first of some rows; None: there is none."""
        same = not self.same_model or metric == "wikitext2 perplexity (window 2048)"
        theirs = f"{metric.removesuffix(' acc')}_acc"
        scale = 100
        if "perplexity" in metric and same and FP8 not in metric:
            theirs = "wikitext2_ppl"
            scale = 1
        values = rows["value"][rows["metric"] == theirs]
        return values.iloc[0] / scale if len(values) else None


def _over_other_tasks(ours: Metric | None) -> bool:
    """Tell if a metric of ours is an average over other tasks than the paper's."""
    return ours is not None and ours.facts.get("tasks", _TASKS) != _TASKS
