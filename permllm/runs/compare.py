"""Differences between two rows, with intervals of a paired bootstrap over the windows or items that both were asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permllm.runs.table import DENSE, Table

RESAMPLES = 10_000
LEVEL = 0.95
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """The difference of two rows in one measure.

    Attributes:
        value: first row less second row; of a perplexity as a share of the second row's value.
            Without an interval it is `change`.
        interval: ends of the interval that holds 95 % of the resampled differences; None for none.
        over: windows or items that were resampled, and seeds, in words, or the reason why there is
            no interval.
    """

    value: float | None
    interval: list[float] | None
    over: str


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
        ours, theirs = (
            float(np.exp(np.log(table.seeds(one, [name])).mean().iloc[0])) for one in (row, other)
        )
    return ours / theirs - 1 if theirs and math.isfinite(theirs) else None


def paired(table: Table, row: int, other: int, name: str) -> Paired:
    """Return the difference of two rows with its interval, or the reason why it has no interval.

    Windows or items are resampled with replacement, those of each text or task on their own, each
    with the scores of both rows averaged over their seeds. For a gap the windows have the scores of
    the unpermuted and the dense model too.
    """
    seeds = [sorted(table.frame["seed"][table.rows[one]]) for one in (row, other)]
    perplexity = name in table.gaps or table.kinds[name] == "perplexity"
    what = "windows" if perplexity else "items"
    parts = (
        _parts(table, (row, other), name, what) if seeds[0] == seeds[1] else "not the same seeds"
    )
    if isinstance(parts, str):
        return Paired(change(table, row, other, name), None, parts)
    values = bootstrap(parts, _gap_difference if name in table.gaps else np.subtract)
    if table.kinds[name] == "perplexity":
        values = [math.expm1(value) for value in values]
    over = f"{sum(part.shape[1] for part in parts)} {what}"
    over += f" of {len(parts)} texts" if perplexity and len(parts) > 1 else ""
    over += f", seeds {', '.join(map(str, seeds[0]))}" if len(seeds[0]) > 1 else ""
    return Paired(values[0], values[1:], over)


def _parts(table: Table, rows: tuple[int, int], name: str, what: str) -> list[Numbers] | str:
    """Return the scores that `bootstrap` takes, or the reason why there are none."""
    parts: list[Numbers] = []
    for text in table.gaps.get(name, [name]):
        # a measure of some runs: of each row, of a gap then also of its unpermuted and its dense
        # model
        asked = []
        for row in rows:
            asked.append((text, table.rows[row]))
            if name in table.gaps:
                asked += [
                    (text, table.rows[table.starts[row]]),
                    (f"{DENSE}{text}", table.rows[row]),
                ]
        found = [
            [value.scores if (value := table.value(run, one)) else {} for run in runs]
            for one, runs in asked
        ]
        if not all(scores for runs in found for scores in runs):
            return f"{what} were not kept"
        for part in found[0][0]:
            kept = [[scores.get(part) for scores in runs] for runs in found]
            if len({scores[0] if scores else None for runs in kept for scores in runs}) > 1:
                return f"not the same {what}"
            parts.append(
                np.array(
                    [np.mean([scores[1] for scores in runs if scores], axis=0) for runs in kept]
                )
            )
    if not all(np.isfinite(part).all() and part.shape[1] > 1 for part in parts):
        return f"{what} are infinite, or a single one"
    return parts


def bootstrap(parts: Sequence[Numbers], of: Callable[..., Any]) -> list[float]:
    """Return a statistic and the ends of its percentile interval, the same at every call.

    Args:
        parts: float64 `(numbers, windows)` of each text or task; the columns of each part are
            resampled on their own.
        of: gives the statistic from as many means over the windows as a part has rows; its mean
            over the parts counts.
    """
    from scipy import stats  # a table without intervals need not wait for it

    def mean(*drawn: Any, axis: int = -1) -> Any:
        means = [
            part[:, columns.astype(int)].mean(axis=-1)
            for part, columns in zip(parts, drawn, strict=True)
        ]
        return np.mean([of(*part) for part in means], axis=0)

    columns = tuple(np.arange(part.shape[1]) for part in parts)
    options: Any = {
        "n_resamples": RESAMPLES,
        "confidence_level": LEVEL,
        "method": "percentile",
        "batch": 500,
    }
    found = stats.bootstrap(
        columns, mean, rng=np.random.default_rng(0), vectorized=True, **options
    ).confidence_interval
    return [float(mean(*columns)), float(found.low), float(found.high)]


def _gap_difference(
    here: Any, start: Any, end: Any, other: Any, its_start: Any, its_end: Any
) -> Any:
    return (start - here) / (start - end) - (its_start - other) / (its_start - its_end)


def comparison(table: Table, first: int, second: int) -> list[dict[str, Any]]:
    """Return two rows in each perplexity, gap and accuracy that both have, as plain values.

    Returns:
        For each its name, both values, the difference, the 95 % `interval` or None, and `over`:
        windows or items that were resampled, or the reason why there is no interval.
    """
    found = []
    for name in table.measures:
        kind = table.kinds[name]
        compared = kind in ("perplexity", "accuracy", "number") or name in table.gaps
        if compared and table.has(first, name) and table.has(second, name):
            pair = paired(table, first, second, name)
            line = {
                "measure": table.heading(name),
                "kind": kind,
                "first": table.shown(first, name),
                "second": table.shown(second, name),
                "difference": pair.value,
                "interval": pair.interval,
                "over": pair.over,
            }
            found.append(line)
    return found
