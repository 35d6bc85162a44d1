"""Comparison of rows, with intervals over seeds and paired windows."""

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

    For a gap the scores are also those of the unpermuted and the dense models, as means over all
    seeds of the unpermuted row.

    Returns:
        `difference`: first row - second row; for a perplexity first / second - 1 of the geometric
        means over the seeds; NaN: not defined. `interval`: ends of the 95 % interval; None: there
        is none. `change`: text of both, and the seeds that are compared if a row has others.
        `over`: text with the number of windows or items, which is zero if the rows have no scores
        of the same ones. `seeds`: number of seeds that are compared.
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
    change = change_text(difference, kind, ends)
    if change and sum(map(len, runs)) < table.frame["row"].isin([row, other]).sum():
        change += f" over seeds {', '.join(map(str, runs[0]['seed']))}"
    unit = "windows" if gap or kind == "perplexity" else "items"
    return {
        "difference": difference,
        "interval": ends,
        "change": change,
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
            lines.append(_scores(table, compared, text))
            if name in table.gaps:
                lines += _scores_of_base(table, compared, text)
        parts = lines[0].keys()
        if not parts or any(line.keys() != parts for line in lines):
            return []
        samples += [np.array([line[part] for line in lines]) for part in parts]
    # An infinite perplexity, and a single window, have no interval.
    usable = all(np.isfinite(sample).all() and sample.shape[-1] > 1 for sample in samples)
    return samples if usable else []


def _scores(table: Table, runs: pd.DataFrame, column: str) -> dict[Any, Numbers]:
    """Return the scores of a row's runs, float64 `(seeds, windows)`, by text or task and identity.

    The result is empty if the runs do not have the same texts or tasks.
    """
    scores = defaultdict(list)
    for run in runs.index:
        measure = table.values[run].get(column)
        for part, (identity, numbers) in (measure.scores if measure else {}).items():
            scores[part, identity].append(numbers)
    if any(len(lines) < len(runs) for lines in scores.values()):
        return {}
    return {part: np.array(lines) for part, lines in scores.items()}


def _scores_of_base(table: Table, runs: pd.DataFrame, text: str) -> list[dict[Any, Numbers]]:
    """Return the scores of the base of a row's gap, and of its dense model, as `_scores`.

    They are means over the seeds of the base, because all seeds are measured from these.
    """
    start = table.members(table.starts[runs["row"].iloc[0]])
    bases = [_scores(table, start, column) for column in (text, f"{DENSE}{text}")]
    return [
        {part: np.tile(scores.mean(axis=0), (len(runs), 1)) for part, scores in base.items()}
        for base in bases
    ]


def interval(parts: Sequence[Numbers], of: Callable[..., Any]) -> list[float]:
    """Return the ends of the 95 % interval of a mean over parts and seeds.

    The interval is Student's t with the variance of the seeds' values, divided by their number,
    plus that of the windows of each part. Degrees of freedom are Welch's and Satterthwaite's. With
    one seed the interval knows the variance of the windows alone.

    Args:
        parts: for each text or task float64 `(scores, seeds, windows)`.
        of: function of the means of a part's scores. Its mean over the parts is a seed's value.
    """
    from scipy.stats import t  # here, because the import takes long

    by_seed = np.mean([of(*part.mean(axis=2)) for part in parts], axis=0)
    mean = float(by_seed.mean())
    variances = [_variance_of_windows(part, of) / len(parts) ** 2 for part in parts]
    freedoms = [part.shape[2] - 1 for part in parts]
    if len(by_seed) > 1:
        variances.append(float(by_seed.var(ddof=1)) / len(by_seed))
        freedoms.append(len(by_seed) - 1)
    variance = sum(variances)
    if variance == 0:
        return [mean, mean]
    terms = [of_part**2 / free for of_part, free in zip(variances, freedoms, strict=True)]
    quantile = float(t.ppf(0.975, variance**2 / sum(terms)))
    half = quantile * math.sqrt(variance)
    return [mean - half, mean + half]


def _variance_of_windows(part: Numbers, of: Callable[..., Any]) -> float:
    """Return the jackknife's variance of the mean over the seeds, which have the same windows."""
    count = part.shape[2]
    without_each = (part.sum(axis=2, keepdims=True) - part) / (count - 1)
    values = of(*without_each).mean(axis=0)
    return float(values.var() * (count - 1))


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
