"""Comparison of rows, with intervals of a paired bootstrap, and with the paper's numbers."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from permllm.errors import ConfigError
from permllm.report.measures import FP8, Measure, Scores, method_of
from permllm.report.table import DENSE, Table
from permllm.settings.config import flatten

Numbers = NDArray[np.float64]
# The paper's tables, and their numbers.
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


def paired(table: Table, row: int, other: int, name: str) -> dict[str, Any]:
    """Return the difference of two rows in one measure with its interval.

    The bootstrap resamples windows or items with replacement, separately for each text or task. A
    window or item has the scores of both rows, as means over the seeds, and for a gap also the
    scores of the unpermuted and the dense models.

    Returns:
        `difference`: first row - second row; for a perplexity first / second - 1 of the geometric
        means over the seeds; None: not defined. `interval`: ends of the interval with 95 % of the
        resampled differences; None: there is none. `over`: text with the number of windows or
        items and the seeds, or with the reason why there is no interval.
    """
    difference = _difference(table, row, other, name)
    seeds = sorted(table.seeds(row, []).index)
    other_seeds = sorted(table.seeds(other, []).index)
    if seeds != other_seeds:
        return {"difference": difference, "interval": None, "over": "not the same seeds"}
    perplexity = name in table.gaps or table.kinds[name] == "perplexity"
    unit = "windows" if perplexity else "items"
    parts = _parts(table, (row, other), name, unit)
    if isinstance(parts, str):
        return {"difference": difference, "interval": None, "over": parts}
    ends = interval(parts, _gap_difference if name in table.gaps else np.subtract)
    if table.kinds[name] == "perplexity":
        ends = [math.expm1(end) for end in ends]
    over = f"{sum(part.shape[1] for part in parts)} {unit}"
    if perplexity and len(parts) > 1:
        over += f" of {len(parts)} texts"
    if len(seeds) > 1:
        over += f", seeds {', '.join(map(str, seeds))}"
    return {"difference": difference, "interval": ends, "over": over}


def _difference(table: Table, row: int, other: int, name: str) -> float | None:
    mean = float(table.means.at[row, name])
    other_mean = float(table.means.at[other, name])
    if table.kinds[name] in ("accuracy", "share"):
        return mean - other_mean
    if table.kinds[name] == "perplexity":
        mean = float(np.exp(np.log(table.seeds(row, [name])[name]).mean()))
        other_mean = float(np.exp(np.log(table.seeds(other, [name])[name]).mean()))
    return mean / other_mean - 1 if other_mean and math.isfinite(other_mean) else None


def _parts(table: Table, rows: tuple[int, int], name: str, unit: str) -> list[Numbers] | str:
    """Return the scores for `interval`, or the reason why there are none."""
    parts: list[Numbers] = []
    for text in table.gaps.get(name, [name]):
        # Columns and runs of the two rows. A gap also needs those of their unpermuted rows, with
        # the dense model, which have one mean for all seeds.
        columns = []
        for row in rows:
            columns.append((text, table.rows[row]))
            if name in table.gaps:
                start = table.rows[table.starts[row]]
                columns += [(text, start), (f"{DENSE}{text}", start)]
        # Scores by part, for each column and each of its runs.
        scores: list[list[dict[str, Scores]]] = []
        for column, runs in columns:
            measures = [table.values[run].get(column) for run in runs]
            scores.append([measure.scores if measure else {} for measure in measures])
        if not all(run_scores for column_scores in scores for run_scores in column_scores):
            return f"{unit} were not kept"
        for part in scores[0][0]:
            identities: set[tuple[Any, ...]] = set()
            lines = []
            for column_scores in scores:
                present = [run_scores[part] for run_scores in column_scores if part in run_scores]
                identities.update(identity for identity, _ in present)
                lines.append([numbers for _, numbers in present])
            if len(identities) > 1 or not all(lines):
                return f"not the same {unit}"
            parts.append(np.array([np.mean(line, axis=0) for line in lines]))
    if not all(np.isfinite(part).all() and part.shape[1] > 1 for part in parts):
        return f"{unit} are infinite, or a single one"
    return parts


def interval(parts: Sequence[Numbers], of: Callable[..., Any]) -> list[float]:
    """Return the ends of the bootstrap's percentile interval, with a fixed seed.

    Args:
        parts: for each text or task float64 `(scores, windows)`. Its columns are resampled.
        of: function of the means of a part's rows. The statistic is its mean over the parts.
    """
    from scipy import stats  # its import takes long, and most tables have no intervals

    def statistic(*drawn: Any, axis: int = -1) -> Any:
        resampled = [
            part[:, columns.astype(int)] for part, columns in zip(parts, drawn, strict=True)
        ]
        return np.mean([of(*part.mean(axis=-1)) for part in resampled], axis=0)

    ends = stats.bootstrap(
        [np.arange(part.shape[1]) for part in parts],
        statistic,
        n_resamples=10_000,
        confidence_level=0.95,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(0),
        vectorized=True,
    ).confidence_interval
    return [float(ends.low), float(ends.high)]


def _gap_difference(
    value: Any, start: Any, dense: Any, other: Any, other_start: Any, other_dense: Any
) -> Any:
    gap = (start - value) / (start - dense)
    return gap - (other_start - other) / (other_start - other_dense)


def differences(table: Table, first: int, second: int) -> list[dict[str, Any]]:
    """Compare two rows in each perplexity, gap and accuracy that both have.

    Returns:
        For each measure its name, its `kind`, both values as texts, and the result of `paired`.
    """
    lines = []
    for name in table.measures:
        kind = table.kinds[name]
        compared = kind in ("perplexity", "accuracy", "number") or name in table.gaps
        if compared and table.has(first, name) and table.has(second, name):
            lines.append(
                {
                    "measure": table.heading(name),
                    "kind": kind,
                    "first": table.shown(first, name),
                    "second": table.shown(second, name),
                    **paired(table, first, second, name),
                }
            )
    return lines


def published(table: str) -> list[Any]:
    """Return the rows of the file for one table of the paper, one of `TABLES`."""
    rows = pd.read_csv(_FILE, keep_default_na=False)
    rows = rows[rows["table"] == TABLES.index(table) + 1]
    return [*rows.itertuples(index=False, name="Published")]


class Comparison:
    """Finder of the paper's number for a run of ours.

    If the table does not have our single model, the numbers belong to another model. `note` says
    so, and any perplexity of ours is compared with the paper's perplexity on WikiText-2.

    Args:
        rows: rows of one table of the paper.
        models: our models.

    Raises:
        ConfigError: there are several models, and the table does not have all of them.
    """

    def __init__(self, rows: list[Any], *models: str) -> None:
        paper_models = list(dict.fromkeys(row.model for row in rows))
        missing = [model for model in models if model not in paper_models]
        if missing and len(models) > 1:
            raise ConfigError(
                f"--paper: the table has {', '.join(paper_models)}, not {', '.join(missing)}: "
                "expected runs of one model, or of the table's models"
            )
        self.same_model = not missing
        self.note = ""
        self._only = models[0] if len(models) == 1 else ""
        if missing:
            self._only = _STAND_IN if _STAND_IN in paper_models else paper_models[0]
            self.note = (
                f"The paper's numbers belong to {self._only} and the paper's protocol, ours to "
                f"{missing[0]}. Compare the order of the rows, not the values."
            )
        self.heading = f"paper, {self._only}" if self._only else "paper"
        self._values: dict[tuple[str, ...], Any] = {}
        self._varied: list[str] = []
        self._tasks: set[str] = set()
        for row in rows:
            scale = 100 if "_acc" in row.metric else 1
            key = (row.model, row.sparsity, row.method, row.setting, row.metric)
            self._values[key] = row.value / scale
            name, varied, _ = row.setting.partition("=")
            if varied and name not in self._varied:
                self._varied.append(name)
            if row.metric.endswith("_acc") and row.metric != "average_acc":
                self._tasks.add(row.metric.removesuffix("_acc"))

    def value(
        self, config: Mapping[str, Any], measure: str, ours: Measure | None = None
    ) -> float | None:
        """Return the paper's number for a measure of a run; None: there is none."""
        metric = self._metric(measure)
        if metric is None or not self._as_in_the_paper(config):
            return None
        if ours and ours.limited and self.same_model:
            return None
        if ours and ours.tasks and set(ours.tasks) != self._tasks:
            return None
        model = config["model"]["name"] if self.same_model else self._only
        pruner = config["pruner"]["name"]
        permutation = config["permutation"]["name"]
        ending = {"none": "", "heuristic": "+cp"}.get(permutation, f"+{permutation}")
        method = f"permllm-{pruner}" if permutation.startswith("lcp") else f"{pruner}{ending}"
        settings = [
            f"{name}={_value(config, name)}".replace("last_layers=None", "last_layers=all")
            for name in self._varied
        ]
        for setting in (*settings, ""):
            key = (model, config["sparsity"], method, setting, metric)
            if key in self._values:
                return self._values[key]
        return None

    def dense(self, measure: str) -> float | None:
        """Return the paper's number of the dense model; None: there are several models."""
        wanted = (self._only, "dense", self._metric(measure))
        for (model, _, method, _, metric), value in self._values.items():
            if (model, method, metric) == wanted:
                return float(value)
        return None

    def _as_in_the_paper(self, config: Mapping[str, Any]) -> bool:
        """Tell if the settings that this table does not vary are those of the paper."""
        name = config["permutation"]["name"]
        foldable = config["permutation"].get("constraint", "free") != "free"
        dense = config.get("keep_dense") or config.get("sparsity_of")
        if method_of(config) != name or foldable or dense:
            return False
        # With another model the texts differ anyway, as the note says.
        matter = ["calibration"] if self.same_model else []
        if name.startswith("lcp"):
            matter += [name for name in _SETTINGS if name != "calibration"]
        fixed = [name for name in matter if name not in self._varied]
        return all(_value(config, name) == _SETTINGS[name][1] for name in fixed)

    def _metric(self, measure: str) -> str | None:
        same = not self.same_model or measure == "wikitext2 perplexity (window 2048)"
        if "perplexity" in measure and same and not measure.endswith(FP8):
            return "wikitext2_ppl"
        match = re.fullmatch(r"(\w+) acc", measure)
        return f"{match[1]}_acc" if match else None


def _value(config: Mapping[str, Any], name: str) -> Any:
    return flatten(dict(config)).get(*_SETTINGS[name])
