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
from permllm.report.measures import FP8, Measure, method_of
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
    found = {"difference": _difference(table, row, other, name), "interval": None}
    seeds, theirs = (sorted(table.seeds(one, []).index) for one in (row, other))
    perplexity = name in table.gaps or table.kinds[name] == "perplexity"
    what = "windows" if perplexity else "items"
    parts = _parts(table, (row, other), name, what) if seeds == theirs else "not the same seeds"
    if isinstance(parts, str):
        return found | {"over": parts}
    ends = interval(parts, _gap_difference if name in table.gaps else np.subtract)
    if table.kinds[name] == "perplexity":
        ends = [math.expm1(end) for end in ends]
    over = f"{sum(part.shape[1] for part in parts)} {what}"
    over += f" of {len(parts)} texts" if perplexity and len(parts) > 1 else ""
    over += f", seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    return found | {"interval": ends, "over": over}


def _difference(table: Table, row: int, other: int, name: str) -> float | None:
    ours, theirs = (float(table.means.at[one, name]) for one in (row, other))
    if table.kinds[name] in ("accuracy", "share"):
        return ours - theirs
    if table.kinds[name] == "perplexity":
        logs = (np.log(table.seeds(one, [name])[name]).mean() for one in (row, other))
        ours, theirs = map(float, map(np.exp, logs))
    return ours / theirs - 1 if theirs and math.isfinite(theirs) else None


def _parts(table: Table, rows: tuple[int, int], name: str, what: str) -> list[Numbers] | str:
    """Return the scores for `interval`, or the reason why there are none."""
    parts: list[Numbers] = []
    for text in table.gaps.get(name, [name]):
        # Columns and runs of the two rows. A gap also needs those of their unpermuted rows, with
        # the dense model, which have one mean for all seeds.
        asked = []
        for row in rows:
            asked.append((text, table.rows[row]))
            if name in table.gaps:
                start = table.rows[table.starts[row]]
                asked += [(text, start), (f"{DENSE}{text}", start)]
        found = [
            [value.scores if (value := table.values[run].get(one)) else {} for run in runs]
            for one, runs in asked
        ]
        if not all(scores for runs in found for scores in runs):
            return f"{what} were not kept"
        for part in found[0][0]:
            kept = [[scores[part] for scores in runs if part in scores] for runs in found]
            of_each = [[scores for _, scores in runs] for runs in kept]
            if len({asked for runs in kept for asked, _ in runs}) > 1 or not all(of_each):
                return f"not the same {what}"
            parts.append(np.array([np.mean(scores, axis=0) for scores in of_each]))
    if not all(np.isfinite(part).all() and part.shape[1] > 1 for part in parts):
        return f"{what} are infinite, or a single one"
    return parts


def interval(parts: Sequence[Numbers], of: Callable[..., Any]) -> list[float]:
    """Return the ends of the bootstrap's percentile interval, with a fixed seed.

    Args:
        parts: for each text or task float64 `(scores, windows)`. Its columns are resampled.
        of: function of the means of a part's rows. The statistic is its mean over the parts.
    """
    from scipy import stats  # its import takes long, and most tables have no intervals

    def statistic(*drawn: Any, axis: int = -1) -> Any:
        chosen = [part[:, columns.astype(int)] for part, columns in zip(parts, drawn, strict=True)]
        return np.mean([of(*part.mean(axis=-1)) for part in chosen], axis=0)

    found = stats.bootstrap(
        [np.arange(part.shape[1]) for part in parts],
        statistic,
        n_resamples=10_000,
        confidence_level=0.95,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(0),
        vectorized=True,
    ).confidence_interval
    return [float(found.low), float(found.high)]


def _gap_difference(
    here: Any, start: Any, end: Any, other: Any, its_start: Any, its_end: Any
) -> Any:
    return (start - here) / (start - end) - (its_start - other) / (its_start - its_end)


def differences(table: Table, first: int, second: int) -> list[dict[str, Any]]:
    """Compare two rows in each perplexity, gap and accuracy that both have.

    Returns:
        For each measure its name, its `kind`, both values as texts, and the result of `paired`.
    """
    found = []
    for name in table.measures:
        kind = table.kinds[name]
        compared = kind in ("perplexity", "accuracy", "number") or name in table.gaps
        if compared and table.has(first, name) and table.has(second, name):
            found.append(
                {
                    "measure": table.heading(name),
                    "kind": kind,
                    "first": table.shown(first, name),
                    "second": table.shown(second, name),
                    **paired(table, first, second, name),
                }
            )
    return found


def published(table: str) -> list[Any]:
    """Return the rows of the file for one table of the paper, one of `TABLES`."""
    rows = pd.read_csv(_FILE, keep_default_na=False)
    found = rows[rows["table"] == TABLES.index(table) + 1]
    return [*found.itertuples(index=False, name="Published")]


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
        theirs = list(dict.fromkeys(row.model for row in rows))
        missing = [model for model in models if model not in theirs]
        if missing and len(models) > 1:
            raise ConfigError(
                f"--paper: the table has {', '.join(theirs)}, not {', '.join(missing)}: "
                "expected runs of one model, or of the table's models"
            )
        self.same_model, self.note = not missing, ""
        self._only = models[0] if len(models) == 1 else ""
        if missing:
            self._only = _STAND_IN if _STAND_IN in theirs else theirs[0]
            self.note = (
                f"The paper's numbers belong to {self._only} and the paper's protocol, ours to "
                f"{missing[0]}. Compare the order of the rows, not the values."
            )
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
        """Return the paper's number for a measure of a run; None: there is none."""
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
        settings = [
            f"{name}={_value(config, name)}".replace("last_layers=None", "last_layers=all")
            for name in self._varied
        ]
        for setting in (*settings, ""):
            if (key := (model, config["sparsity"], method, setting, metric)) in self._values:
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
