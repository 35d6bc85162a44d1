"""Comparison of rows, with intervals over seeds and paired windows."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from permllm.report.metrics import Metric, change_text
from permllm.report.table import Table

Numbers = NDArray[np.float64]


def paired(table: Table, row: int, other: int, name: str) -> dict[str, Any]:
    """Return the difference of two rows in one metric with its interval.

    For a gap the scores are also those of the unpermuted and the dense models, as means over all
    seeds of the unpermuted row.

    Returns:
        `difference`: first row - second row; for a perplexity first / second - 1 of the geometric
        means over the seeds; NaN: not defined. `interval`: ends of the 95 % interval; None: there
        is none. `change`: text of both, and the seeds that are compared if a row has others.
        `over`: text with the number of windows or items, which is zero if the rows have no scores
        of the same ones. `seeds`: number of seeds that are compared.
    """
    kind = table.kind(name)
    gap = name in table.gaps
    values = table.by_seed(row, name)["value"].sort_index()
    others = table.by_seed(other, name)["value"].sort_index()
    count = len(values) + len(others)
    common = values.index.intersection(others.index)
    # The base of gaps is the mean over all its seeds, so that it closes none.
    if len(common) and not (gap and {row, other} & {*table.starts.values()}):
        values = values[common]
        others = others[common]
    difference = _difference(values, others, kind)
    samples = []
    if values.index.equals(others.index):
        samples = _samples(table, [row, other], name, values.index)
    ends = None
    if samples:
        ends = interval(samples, _gap_difference if gap else np.subtract)
        if kind == "perplexity":
            ends = [math.expm1(end) for end in ends]
    change = change_text(difference, kind, ends)
    if change and len(values) + len(others) < count:
        change += f" over seeds {', '.join(map(str, common))}"
    unit = "windows" if gap or kind == "perplexity" else "items"
    return {
        "difference": difference,
        "interval": ends,
        "change": change,
        "over": f"{sum(sample.shape[-1] for sample in samples)} {unit}",
        "seeds": len(values),
    }


def _difference(values: pd.Series, others: pd.Series, kind: str) -> float:
    if kind in ("accuracy", "share"):
        return float(values.mean() - others.mean())
    with np.errstate(all="ignore"):  # what is not finite has no difference
        if kind == "perplexity":
            return float(np.expm1(np.log(values).mean() - np.log(others).mean()))
        return float(values.mean() / others.mean() - 1)


def _samples(table: Table, rows: list[int], name: str, seeds: pd.Index) -> list[Numbers]:
    """Return the scores for `interval` of rows with equal seeds; empty: they cannot be compared."""
    samples = []
    for text in table.gaps.get(name, [name]):
        lines = []
        for row in rows:
            lines.append(_scores(table.by_seed(row, text).loc[seeds, "detail"]))
            if name in table.gaps:
                start = table.by_seed(table.starts[row], text)["detail"]
                # All seeds are measured from means over the seeds of the base.
                for metrics in (start, [metric.dense for metric in start]):
                    means = {part: of.mean(axis=0) for part, of in _scores(metrics).items()}
                    lines.append({part: np.tile(of, (len(seeds), 1)) for part, of in means.items()})
        parts = lines[0].keys()
        if not parts or any(line.keys() != parts for line in lines):
            return []
        samples += [np.array([line[part] for line in lines]) for part in parts]
    # An infinite perplexity, and a single window, have no interval.
    usable = all(np.isfinite(sample).all() and sample.shape[-1] > 1 for sample in samples)
    return samples if usable else []


def _scores(metrics: Collection[Metric]) -> dict[Any, Numbers]:
    """Return the scores of a row's runs, float64 `(seeds, windows)`, by text or task and identity.

    The result is empty if the runs do not have the same texts or tasks.
    """
    scores = defaultdict(list)
    for metric in metrics:
        for part, (identity, numbers) in metric.scores.items():
            scores[part, identity].append(numbers)
    if any(len(lines) < len(metrics) for lines in scores.values()):
        return {}
    return {part: np.array(lines) for part, lines in scores.items()}


def interval(parts: Sequence[Numbers], statistic: Callable[..., Any]) -> list[float]:
    """Return the ends of the 95 % interval of a mean over parts and seeds.

    The interval is Student's t with the variance of the seeds' values, divided by their number,
    plus that of the windows of each part. Degrees of freedom are Welch's and Satterthwaite's. With
    one seed the interval knows the variance of the windows alone.

    Args:
        parts: for each text or task float64 `(scores, seeds, windows)`.
        statistic: function of the means of a part's scores. Its mean over the parts is a seed's
            value.
    """
    from scipy.stats import t  # here, because the import takes long

    by_seed = np.mean([statistic(*part.mean(axis=2)) for part in parts], axis=0)
    mean = float(by_seed.mean())
    variances = [_variance_of_windows(part, statistic) / len(parts) ** 2 for part in parts]
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


def _variance_of_windows(part: Numbers, statistic: Callable[..., Any]) -> float:
    """Return the jackknife's variance of the mean over the seeds, which have the same windows."""
    count = part.shape[2]
    without_each = (part.sum(axis=2, keepdims=True) - part) / (count - 1)
    values = statistic(*without_each).mean(axis=0)
    return float(values.var() * (count - 1))


def _gap_difference(
    value: Any, start: Any, dense: Any, other: Any, other_start: Any, other_dense: Any
) -> Any:
    gap = (start - value) / (start - dense)
    return gap - (other_start - other) / (other_start - other_dense)


def differences(table: Table, first: int, second: int, names: list[str]) -> list[dict[str, Any]]:
    """Compare two rows in each perplexity, gap, accuracy and number that both have.

    Args:
        table: table of the runs.
        first, second: the rows.
        names: metrics to compare.

    Returns:
        For each metric its name, both values and their change as texts, and the result of
        `paired`.
    """
    lines = []
    for name in names:
        compared = table.kind(name) in ("perplexity", "accuracy", "number") or name in table.gaps
        texts = {"first": table.shown(first, name), "second": table.shown(second, name)}
        if compared and all(texts.values()):
            pair = paired(table, first, second, name)
            lines.append({"metric": table.heading(name)} | texts | pair)
    return lines
