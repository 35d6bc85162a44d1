"""Differences of two rows, with intervals of a paired bootstrap over windows or items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permllm.runs.table import DENSE, Table

RESAMPLES = 10_000
LEVEL = 0.95
Numbers = NDArray[np.float64]


def paired(table: Table, row: int, other: int, name: str) -> dict[str, Any]:
    """Return the difference of two rows in one measure with its interval.

    Windows or items are resampled with replacement, those of each text or task on their own, each
    with the scores of both rows averaged over their seeds. For a gap the windows have the scores of
    the unpermuted and the dense model too.

    Returns:
        `difference`: first row less second row, of a perplexity as a share of the second row's, by
        the geometric mean over seeds, None where there is none. `interval`: ends of the interval
        that holds 95 % of the resampled differences, or None. `over`: windows or items that were
        resampled, and seeds, in words, or the reason why there is no interval.
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
    """Return the scores that `interval` takes, or the reason why there are none."""
    parts: list[Numbers] = []
    for text in table.gaps.get(name, [name]):
        # Measures of runs: of each row, of a gap also of its unpermuted and its dense model.
        asked = []
        for row in rows:
            asked.append((text, table.rows[row]))
            if name in table.gaps:
                asked.append((text, table.rows[table.starts[row]]))
                asked.append((f"{DENSE}{text}", table.rows[row]))
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
    """Return the ends of the percentile interval of a statistic, the same at every call.

    Args:
        parts: float64 `(numbers, windows)` of each text or task; the columns of each part are
            resampled on their own.
        of: gives the statistic from as many means over the windows as a part has rows; its mean
            over the parts counts.
    """
    from scipy import stats  # a table without intervals need not wait for it

    def mean(*drawn: Any, axis: int = -1) -> Any:
        chosen = [part[:, columns.astype(int)] for part, columns in zip(parts, drawn, strict=True)]
        return np.mean([of(*part.mean(axis=-1)) for part in chosen], axis=0)

    found = stats.bootstrap(
        [np.arange(part.shape[1]) for part in parts],
        mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
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


def comparison(table: Table, first: int, second: int) -> list[dict[str, Any]]:
    """Return two rows in each perplexity, gap and accuracy that both have, as plain values.

    Returns:
        For each its name, `kind`, both values, and what `paired` returns.
    """
    found = []
    for name in table.measures:
        kind = table.kinds[name]
        compared = kind in ("perplexity", "accuracy", "number") or name in table.gaps
        if compared and table.has(first, name) and table.has(second, name):
            values = {"first": table.shown(first, name), "second": table.shown(second, name)}
            line = {"measure": table.heading(name), "kind": kind} | values
            found.append(line | paired(table, first, second, name))
    return found
