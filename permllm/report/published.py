"""The paper's published numbers beside ours."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from permllm.errors import ConfigError
from permllm.report.measures import FP8, Measure, method_of
from permllm.settings.config import flatten

# The paper's tables.
TABLES = [f"table{number}" for number in range(1, 9)]
_FILE = Path(__file__).parent / "published.csv"
# Model whose numbers are shown if a table of the paper does not have ours.
_STAND_IN = "llama-2-7b"
_PERPLEXITY = "wikitext2_ppl"
# Settings that tables of the paper vary, with our names, and the paper's value in the other tables.
_SETTINGS: dict[str, tuple[str, Any]] = {
    "sinkhorn_iterations": ("permutation.sinkhorn_iterations", 5),
    "calibration": ("calibration.dataset", "c4"),
    "block_size": ("block_size", 64),
    "last_layers": ("permutation.last_layers", None),
}


def published(table: str) -> pd.DataFrame:
    """Return the rows of the file for one table of the paper, one of `TABLES`."""
    rows = pd.read_csv(_FILE, keep_default_na=False)
    return rows[rows["table"] == TABLES.index(table) + 1]


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
        self._rows = published(name)
        ours = sorted({*models})
        missing = [model for model in ours if model not in {*self._rows["model"]}]
        if missing and len(ours) > 1:
            raise ConfigError(
                f"--paper: the table does not have {', '.join(missing)}: expected runs of one "
                f"model, or of {', '.join(self._rows['model'].unique())}"
            )
        self.same_model = not missing
        self.notes: list[str] = []
        self._only = ours[0] if len(ours) == 1 else None
        if missing:
            rows = self._rows[self._rows["model"] == _STAND_IN]
            self._rows = rows if len(rows) else self._rows
            self._only = self._rows["model"].iloc[0]
            self.notes.append(
                f"The paper's numbers belong to {self._only} and the paper's protocol, ours to "
                f"{missing[0]}. Compare the order of the rows, not the values."
            )
        self.heading = f"paper, {self._only}" if self._only else "paper"
        self._varied = {setting.partition("=")[0] for setting in self._rows["setting"]}

    def value(
        self, config: Mapping[str, Any], measure: str, ours: Measure | None = None
    ) -> float | None:
        """Return the paper's number for a measure of a run; None: there is none."""
        if not self._as_in_the_paper(config):
            return None
        if ours and ((ours.limited and self.same_model) or not self._has_tasks(ours)):
            return None
        pruner = config["pruner"]["name"]
        permutation = config["permutation"]["name"]
        method = f"{pruner}+{permutation}"
        if permutation.startswith("lcp"):
            method = f"permllm-{pruner}"
        settings = [""]
        for name in self._varied - {""}:
            value = _value(config, name)
            settings.append(f"{name}={'all' if value is None else value}")
        return self._number(
            measure,
            model=[config["model"]["name"] if self.same_model else self._only],
            sparsity=[config["sparsity"]],
            method=[method.removesuffix("+none").replace("+heuristic", "+cp")],
            setting=settings,
        )

    def dense(self, measure: str) -> float | None:
        """Return the paper's number of the dense model; None: there are several models."""
        return self._number(measure, model=[self._only], method=["dense"])

    def _number(self, measure: str, **columns: list[str | None]) -> float | None:
        """Return the number in the row with such texts in these columns; None: there is none."""
        metric = self._metric(measure)
        rows = self._rows[self._rows["metric"] == metric]
        for name, texts in columns.items():
            rows = rows[rows[name].isin(texts)]
        scale = 1 if metric == _PERPLEXITY else 100
        return float(rows["value"].iloc[0]) / scale if len(rows) else None

    def _has_tasks(self, ours: Measure) -> bool:
        """Tell if an average of ours is over the tasks of the paper."""
        accuracies = {f"{task}_acc" for task in (*ours.tasks, "average")}
        of_paper = {name for name in self._rows["metric"] if name.endswith("_acc")}
        return not ours.tasks or accuracies == of_paper

    def _as_in_the_paper(self, config: Mapping[str, Any]) -> bool:
        """Tell if the settings that this table does not vary are those of the paper."""
        name = config["permutation"]["name"]
        foldable = config["permutation"].get("constraint", "free") != "free"
        dense = config.get("keep_dense") or config.get("sparsity_of")
        if method_of(config) != name or foldable or dense:
            return False
        settings = {*_SETTINGS} if name.startswith("lcp") else {"calibration"}
        if not self.same_model:  # the texts differ anyway, as the note says
            settings.discard("calibration")
        return all(_value(config, name) == _SETTINGS[name][1] for name in settings - self._varied)

    def _metric(self, measure: str) -> str | None:
        if measure.endswith(" acc"):
            return f"{measure.removesuffix(' acc')}_acc"
        same = not self.same_model or measure == "wikitext2 perplexity (window 2048)"
        return _PERPLEXITY if "perplexity" in measure and same and FP8 not in measure else None


def _value(config: Mapping[str, Any], name: str) -> Any:
    return flatten(dict(config)).get(*_SETTINGS[name])
