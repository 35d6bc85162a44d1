"""Differences between two rows, with intervals of a paired bootstrap over the windows or items that both were asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permllm.runs.dataframe import DENSE
from permllm.runs.measures import Scores
from permllm.runs.table import GAP, Table

RESAMPLES = 10_000
LEVEL = 0.95
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """The difference of two rows in one measure.

    Attributes:
        value: first row less second row, over the seeds that both have; of a perplexity as a share of the second row's value.
        low: lower end of the interval that holds 95 % of the resampled differences.
        high: upper end of the interval.
        over: windows or items that were resampled, and seeds, in words.
        whole: both rows have the same seeds.
    """

    value: float
    low: float
    high: float
    over: str
    whole: bool


def change(table: Table, row: int, other: int, name: str) -> float | None:
    """Return the difference of two rows, None where there is none.

    A perplexity is compared as a share of the other's, by the geometric mean over seeds.
    """
    if not (table.has(row, name) and table.has(other, name)):
        return None
    ours, theirs = (float(table.means.at[one, name]) for one in (row, other))
    if table.kinds[name] in ("accuracy", "share"):
        return ours - theirs
    if table.kinds[name] == "perplexity":
        ours, theirs = (float(np.exp(np.log(table.seeds(one, name)).mean())) for one in (row, other))
    return ours / theirs - 1 if theirs and math.isfinite(theirs) else None


def paired(table: Table, row: int, other: int, name: str) -> Paired | str:
    """Return the difference of two rows with its interval, or the reason why it has no interval.

    Windows or items are resampled with replacement, those of each text or task on their own, each with the scores of both rows
    averaged over the seeds that both have. For a gap the windows have the scores of the unpermuted and the dense model too.
    """
    if not (table.has(row, name) and table.has(other, name)):
        return "not measured in both rows"
    if table.kinds[name] == "number":
        return "a number of all items together"
    perplexity = name in table.gaps or table.kinds[name] == "perplexity"
    what = "windows" if perplexity else "items"
    runs = [dict(zip(table.frame["seed"][table.rows[one]], table.rows[one], strict=True)) for one in (row, other)]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        return "no seed in common"
    parts: list[Numbers] = []
    for one in table.gaps.get(name, [name]):
        found = _of_gap(table, row, other, one, seeds) if name in table.gaps else _of_rows(table, runs, one, seeds)
        if not all(scores for rows in found for scores in rows):
            return f"{what} were not kept"
        for part in found[0][0]:
            kept = [[scores.get(part) for scores in rows] for rows in found]
            if len({scores.asked if scores else None for rows in kept for scores in rows}) > 1:
                return f"not the same {what}"
            parts.append(np.array([np.mean([scores.values for scores in rows if scores], axis=0) for rows in kept]))
    if not all(np.isfinite(part).all() and part.shape[1] > 1 for part in parts):
        return f"{what} are infinite, or a single one"
    value, low, high = bootstrap(parts, _gap_difference if name in table.gaps else np.subtract)
    if table.kinds[name] == "perplexity":
        value, low, high = map(math.expm1, (value, low, high))
    whole = runs[0].keys() == runs[1].keys()
    over = f"{sum(part.shape[1] for part in parts)} {what}"
    over += f" of {len(parts)} texts" if perplexity and len(parts) > 1 else ""
    if len(seeds) > 1 or not whole:
        over += f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" + " alone" * (not whole)
    return Paired(value, low, high, over, whole)


def bootstrap(parts: Sequence[Numbers], of: Callable[..., Any]) -> tuple[float, float, float]:
    """Return a statistic and its percentile interval, the same at every call.

    Args:
        parts: float64 `(numbers, windows)` of each text or task; the columns of each part are resampled on their own.
        of: gives the statistic from as many means over the windows as a part has rows; its mean over the parts counts.
    """
    from scipy import stats  # a table without intervals need not wait for it

    def mean(*drawn: Any, axis: int = -1) -> Any:
        means = [part[:, columns.astype(int)].mean(axis=-1) for part, columns in zip(parts, drawn, strict=True)]
        return np.mean([of(*part) for part in means], axis=0)

    columns = tuple(np.arange(part.shape[1]) for part in parts)
    options: Any = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "method": "percentile", "batch": 500}
    found = stats.bootstrap(columns, mean, rng=np.random.default_rng(0), vectorized=True, **options).confidence_interval
    return float(mean(*columns)), float(found.low), float(found.high)


def _of_rows(table: Table, runs: list[dict[Any, int]], name: str, seeds: list[Any]) -> list[list[dict[str, Scores]]]:
    return [_scores(table, [of_row[seed] for seed in seeds], name) for of_row in runs]


def _of_gap(table: Table, row: int, other: int, name: str, seeds: list[Any]) -> list[list[dict[str, Scores]]]:
    """Return the scores of each row, its unpermuted model and its dense model, of which each has several runs."""
    found, of = [], table.frame["seed"]
    for one in (row, other):
        members, start = table.rows[one], table.rows[table.starts[one]]
        paired_start = set(of[start]) == set(of[members])
        found.append(_scores(table, [run for run in members if of[run] in seeds], name))
        found.append(_scores(table, [run for run in start if not paired_start or of[run] in seeds], name))
        found.append(_scores(table, members, f"{DENSE}{name}"))
    return found


def _scores(table: Table, runs: list[int], name: str) -> list[dict[str, Scores]]:
    return [value.scores if (value := table.value(run, name)) else {} for run in runs]


def _gap_difference(here: Any, start: Any, end: Any, other: Any, its_start: Any, its_end: Any) -> Any:
    return (start - here) / (start - end) - (its_start - other) / (its_start - its_end)


def comparison(table: Table, first: int, second: int) -> list[dict[str, Any]]:
    """Return two rows in each perplexity, gap and accuracy that both have, as plain values.

    Returns:
        For each its name, both values, the difference, the 95 % `interval` or None, and `over`: windows or items that were
        resampled, or the reason why there is no interval.
    """
    found = []
    for name in table.measures:
        kind = table.kinds[name]
        if not (table.has(first, name) and table.has(second, name)):
            continue
        if kind not in ("perplexity", "accuracy", "number") and GAP not in name:
            continue
        pair = paired(table, first, second, name)
        line: dict[str, Any] = {"measure": table.heading(name), "kind": kind}
        line |= {"first": table.shown(first, name), "second": table.shown(second, name)}
        if isinstance(pair, str):
            line |= {"difference": change(table, first, second, name), "interval": None, "over": pair}
        else:
            line |= {"difference": pair.value, "interval": [pair.low, pair.high], "over": pair.over}
        found.append(line)
    return found
