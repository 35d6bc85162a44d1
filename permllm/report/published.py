"""The paper's published numbers beside ours."""

import re
from collections.abc import Mapping
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

    def __init__(self, name: str, models: list[str]) -> None:
        self._rows = published(name)
        paper_models = [*self._rows["model"].unique()]
        missing = [model for model in models if model not in paper_models]
        if missing and len(models) > 1:
            raise ConfigError(
                f"--paper: the table has {', '.join(paper_models)}, not {', '.join(missing)}: "
                "expected runs of one model, or of the table's models"
            )
        self.same_model = not missing
        self.notes: list[str] = []
        self._only = models[0] if len(models) == 1 else ""
        if missing:
            self._only = _STAND_IN if _STAND_IN in paper_models else paper_models[0]
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
        limited = ours and ours.limited and self.same_model
        if limited or not self._has_tasks(ours) or not self._as_in_the_paper(config):
            return None
        pruner = config["pruner"]["name"]
        permutation = config["permutation"]["name"]
        ending = {"none": "", "heuristic": "+cp"}.get(permutation, f"+{permutation}")
        settings = [
            f"{name}={_value(config, name)}".replace("last_layers=None", "last_layers=all")
            for name in self._varied - {""}
        ]
        rows = self._rows[self._rows["setting"].isin(["", *settings])]
        return self._number(
            rows,
            measure,
            model=config["model"]["name"] if self.same_model else self._only,
            sparsity=config["sparsity"],
            method=f"permllm-{pruner}" if permutation.startswith("lcp") else f"{pruner}{ending}",
        )

    def dense(self, measure: str) -> float | None:
        """Return the paper's number of the dense model; None: there are several models."""
        return self._number(self._rows, measure, model=self._only, method="dense")

    def _number(self, rows: pd.DataFrame, measure: str, **columns: str) -> float | None:
        """Return the number in the rows with these texts in their columns; None: there is none."""
        metric = self._metric(measure)
        for name, text in {**columns, "metric": metric}.items():
            rows = rows[rows[name] == text]
        scale = 1 if metric == "wikitext2_ppl" else 100
        return float(rows["value"].iloc[0]) / scale if len(rows) else None

    def _has_tasks(self, ours: Measure | None) -> bool:
        """Tell if an average of ours is over the tasks of the paper."""
        metrics = {f"{task}_acc" for task in ours.tasks} if ours else set()
        of_paper = {name for name in self._rows["metric"] if name.endswith("_acc")}
        return not metrics or metrics == of_paper - {"average_acc"}

    def _as_in_the_paper(self, config: Mapping[str, Any]) -> bool:
        """Tell if the settings that this table does not vary are those of the paper."""
        name = config["permutation"]["name"]
        foldable = config["permutation"].get("constraint", "free") != "free"
        dense = config.get("keep_dense") or config.get("sparsity_of")
        if method_of(config) != name or foldable or dense:
            return False
        # With another model the texts differ anyway, as the note says.
        matter = {"calibration"} if self.same_model else set()
        if name.startswith("lcp"):
            matter |= _SETTINGS.keys() - {"calibration"}
        return all(_value(config, name) == _SETTINGS[name][1] for name in matter - self._varied)

    def _metric(self, measure: str) -> str | None:
        same = not self.same_model or measure == "wikitext2 perplexity (window 2048)"
        if "perplexity" in measure and same and not measure.endswith(FP8):
            return "wikitext2_ppl"
        match = re.fullmatch(r"(\w+) acc", measure)
        return f"{match[1]}_acc" if match else None


def _value(config: Mapping[str, Any], name: str) -> Any:
    return flatten(dict(config)).get(*_SETTINGS[name])
