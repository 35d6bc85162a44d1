"""Comparison of rows, with intervals of a paired bootstrap."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from permllm.report.measures import DENSE, change_text
from permllm.report.table import Table

Numbers = NDArray[np.float64]


def paired(table: Table, row: int, other: int, name: str) -> dict[str, Any]:
    """Return the difference of two rows in one measure with its interval.

    The bootstrap resamples the seeds, and separately for each text or task the windows or items,
    with replacement and alike for both rows. For a gap the scores are also those of the unpermuted
    and the dense models; where the former have other seeds, their mean over these.

    Returns:
        `difference`: first row - second row; for a perplexity first / second - 1 of the geometric
        means over the seeds; NaN: not defined. `interval`: ends of the interval with 95 % of the
        resampled differences; None: there is none. `change`: text of both. `over`: text with the
        number of windows or items, which is zero if the rows have no scores of the same ones.
        `seeds`: number of seeds that are compared.
    """
    kind = table.kinds[name]
    gap = name in table.gaps
    runs = table.members(row).sort_values("seed"), table.members(other).sort_values("seed")
    # The base of gaps is the mean over all its seeds, so that it closes none.
    if not (gap and {row, other} & set(table.starts.values())):
        runs = _of_common_seeds(*runs)
    difference = _difference(table, *runs, name)
    samples = _samples(table, *runs, name)
    ends = None
    if samples:
        ends = interval(samples, _gap_difference if gap else np.subtract)
        if kind == "perplexity":
            ends = [math.expm1(end) for end in ends]
    unit = "windows" if gap or kind == "perplexity" else "items"
    return {
        "difference": difference,
        "interval": ends,
        "change": change_text(difference, kind, ends),
        "over": f"{sum(sample.shape[-1] for sample in samples)} {unit}",
        "seeds": len(runs[0]),
    }


def _of_common_seeds(runs: pd.DataFrame, others: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs of two rows whose seeds both rows have; all runs if there is no such seed."""
    common = set(runs["seed"]) & set(others["seed"])
    if not common:
        return runs, others
    return runs[runs["seed"].isin(common)], others[others["seed"].isin(common)]


def _difference(table: Table, runs: pd.DataFrame, others: pd.DataFrame, name: str) -> float:
    values = runs[name]
    other_values = others[name]
    if table.kinds[name] in ("accuracy", "share"):
        return float(values.mean() - other_values.mean())
    with np.errstate(all="ignore"):  # what is not finite has no difference
        if table.kinds[name] == "perplexity":
            return float(np.expm1(np.log(values).mean() - np.log(other_values).mean()))
        return float(values.mean() / other_values.mean() - 1)


def _samples(table: Table, runs: pd.DataFrame, others: pd.DataFrame, name: str) -> list[Numbers]:
    """Return the scores for `interval`; empty: the runs cannot be compared."""
    seeds = [*runs["seed"]]
    if [*others["seed"]] != seeds:
        return []
    samples = []
    for text in table.gaps.get(name, [name]):
        lines = []
        for compared in (runs, others):
            lines.append(_scores(table, compared, text, seeds))
            if name in table.gaps:
                start = table.members(table.starts[compared["row"].iloc[0]]).sort_values("seed")
                lines.append(_scores(table, start, text, seeds))
                lines.append(_scores(table, start, f"{DENSE}{text}", seeds))
        parts = lines[0].keys()
        if not parts or any(line.keys() != parts for line in lines):
            return []
        samples += [np.array([line[part] for line in lines]) for part in parts]
    # An infinite perplexity, and a single window, have no interval.
    usable = all(np.isfinite(sample).all() and sample.shape[-1] > 1 for sample in samples)
    return samples if usable else []


def _scores(
    table: Table, runs: pd.DataFrame, column: str, seeds: Sequence[Any]
) -> dict[Any, Numbers]:
    """Return the scores of a row's runs, float64 `(seeds, windows)`, by text or task and identity.

    The runs come in the order of their seeds. The result is empty if they do not have the same
    texts or tasks.
    """
    scores = defaultdict(list)
    for run in runs.index:
        measure = table.values[run].get(column)
        for part, (identity, numbers) in (measure.scores if measure else {}).items():
            scores[part, identity].append(numbers)
    if any(len(lines) < len(runs) for lines in scores.values()):
        return {}
    if list(runs["seed"]) == seeds:
        return {part: np.array(lines) for part, lines in scores.items()}
    means = {part: np.mean(lines, axis=0) for part, lines in scores.items()}
    return {part: np.tile(mean, (len(seeds), 1)) for part, mean in means.items()}


def interval(parts: Sequence[Numbers], of: Callable[..., Any]) -> list[float]:
    """Return the ends of the bootstrap's percentile interval, from 10,000 resamples.

    Args:
        parts: for each text or task float64 `(scores, seeds, windows)`. One resample of the seeds
            holds for all parts, and each part has its own of the windows.
        of: function of the means of a part's scores. The statistic is its mean over the parts.
    """
    generator = np.random.default_rng(0)
    statistics = []
    for _ in range(20):  # few at a time, because a task can have 10,000 items
        of_seeds = _resamples(generator, parts[0].shape[1])
        values = []
        for part in parts:
            of_windows = _resamples(generator, part.shape[2])
            means = np.einsum("xsw,rs,rw->xr", part, of_seeds, of_windows, optimize=True)
            values.append(of(*means))
        statistics.append(np.mean(values, axis=0))
    return [float(end) for end in np.quantile(statistics, (0.025, 0.975))]


def _resamples(generator: np.random.Generator, size: int) -> Numbers:
    """Return how often 500 resamples draw each of `size` members, as shares `(500, size)`."""
    return generator.multinomial(size, np.full(size, 1 / size), 500) / size


def _gap_difference(
    value: Any, start: Any, dense: Any, other: Any, other_start: Any, other_dense: Any
) -> Any:
    gap = (start - value) / (start - dense)
    return gap - (other_start - other) / (other_start - other_dense)


def differences(table: Table, first: int, second: int) -> list[dict[str, Any]]:
    """Compare two rows in each perplexity, gap, accuracy and number that both have.

    Returns:
        For each measure its name, both values and their change as texts, and the result of
        `paired`.
    """
    lines = []
    for name in table.measures:
        kind = table.kinds[name]
        compared = kind in ("perplexity", "accuracy", "number") or name in table.gaps
        if compared and table.has(first, name) and table.has(second, name):
            pair = paired(table, first, second, name)
            lines.append(
                {
                    "measure": table.heading(name),
                    "first": table.shown(first, name),
                    "second": table.shown(second, name),
                    **pair,
                }
            )
    return lines
