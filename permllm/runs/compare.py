"""How far two rows are apart, with an interval: a paired bootstrap over the windows, or the items, that both were asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permllm.runs.table import Gap, Measure, Row, Scored, mean_log

RESAMPLES = 10_000
LEVEL = 0.95
# Resamples that are in memory at a time.
_AT_ONCE = 500
# A multinomial number costs about as much as so many draws.
_CHEAPER = 16


@dataclass(frozen=True)
class Paired:
    """The difference of two rows in one measure.

    Attributes:
        kind: of the measure: of a `perplexity` the differences are those of its logarithm, of an `accuracy` or a gap (`share`)
            its own.
        difference: the first row's value less the second's, over the windows or items and seeds that both have.
        low: lower end of the interval that holds 95 % of the resampled differences.
        high: its upper end.
        over: what was resampled, in words.
        whole: both rows have the same seeds, so that the difference is that of all their runs.
    """

    kind: str
    difference: float
    low: float
    high: float
    over: str
    whole: bool

    def shown(self) -> tuple[float, float, float]:
        """Difference and interval as tables have them: of a perplexity as shares of the second row's value."""
        values = (self.difference, self.low, self.high)
        first, second, third = map(relative, values) if self.kind == "perplexity" else values
        return first, second, third


def change_between(ours: Measure, theirs: Measure) -> float:
    """How far a measure is from another one of its kind: as a difference, of perplexities as a share of the other's.

    Of the perplexities of several seeds it is the geometric mean of what each seed gives, which `paired` has an interval of.
    """
    if ours.kind == "perplexity":
        return relative(mean_log(ours) - mean_log(theirs))
    if ours.kind in ("accuracy", "share"):
        return ours.mean - theirs.mean
    return ours.mean / theirs.mean - 1 if theirs.mean else math.nan


def relative(logarithm: float) -> float:
    """The change of a value whose logarithm changes by so much."""
    try:
        return math.expm1(logarithm)
    except OverflowError:
        return math.inf


def paired(ours: Row, theirs: Row, name: str) -> Paired | str:
    """The difference of two rows in a measure, or why it has no interval.

    Windows, or items, are resampled with replacement, 10,000 times from the same generator, each with what both rows made of
    it: the difference of two runs of one seed, averaged over the seeds. Of an average accuracy the items of each task are
    resampled on their own. The interval is the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap,
    chapter 13).

    Of a gap the windows of each text are resampled on their own, with what the rows, their unpermuted models and the dense
    model made of them, each averaged over its seeds; the gaps follow from these, and their mean over the texts.

    Args:
        ours: a row.
        theirs: the row that it is compared with.
        name: of a perplexity, a gap or an accuracy.
    """
    first, second = ours.measures.get(name), theirs.measures.get(name)
    if first is None or second is None:
        return "not measured in both rows"
    if first.gaps or second.gaps:
        return _paired_gaps(ours, theirs, name)
    if first.kind == "number":
        return "a number of all items together"
    what = "windows" if first.kind == "perplexity" else "items"
    runs, others = _by_seed(ours, first), _by_seed(theirs, second)
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        return "no seed in common"
    parts: dict[str, list[NDArray[np.float64]]] = {}
    asked: dict[str, set[tuple[Any, ...]]] = {}
    for seed in seeds:
        here, there = runs[seed], others[seed]
        if not here or not there:
            return f"{what} were not kept"
        if {key: scored.of for key, scored in here.items()} != {key: scored.of for key, scored in there.items()}:
            return f"not the same {what}"
        for key, scored in here.items():
            difference = np.array(scored.values, dtype=np.float64) - np.array(there[key].values, dtype=np.float64)
            parts.setdefault(key, []).append(difference / scored.tokens)
            asked.setdefault(key, set()).add(scored.of)
    # Windows of one measure are of one text; the model that reads them may be a random one, another for each seed.
    if what == "items" and any(len(found) > 1 for found in asked.values()):
        return f"not the same {what} for each seed"
    differences = [np.mean(found, axis=0) for found in parts.values()]
    resampled = bootstrap(differences)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    count = sum(map(len, differences))
    value, whole = float(np.mean([part.mean() for part in differences])), runs.keys() == others.keys()
    return Paired(first.kind, value, float(low), float(high), f"{count} {what}{_told(seeds, whole)}", whole)


def _paired_gaps(one_row: Row, other_row: Row, measure: str) -> Paired | str:
    """The difference of two gaps, or why it has no interval."""
    ours, theirs = one_row.measures[measure].gaps, other_row.measures[measure].gaps
    if ours.keys() != theirs.keys():
        return "not the same texts"
    of_row, of_other = ([run.config["seed"] for run in row.runs] for row in (one_row, other_row))
    seeds = sorted(set(of_row) & set(of_other))
    if not seeds:
        return "no seed in common"
    generator = np.random.default_rng(0)
    value, resampled, count = 0.0, np.zeros(RESAMPLES), 0
    for name, gap in ours.items():
        other = theirs[name]
        six = [*_of_seeds(gap, of_row, seeds), *_of_seeds(other, of_other, seeds)]
        if not all(runs and all(runs) for runs in six):
            return "windows were not kept"
        read = [[scored for of_run in runs for scored in of_run.values()] for runs in six]
        if len({scored.of for scored in read[0]} ^ {scored.of for scored in read[3]}):
            return "not the same windows"
        # The same text in the same windows; a random model is another one for each seed.
        if len({scored.of[:1] + scored.of[2:] for runs in read for scored in runs}) > 1:
            return "not the same windows"
        nats = np.array(
            [np.mean([np.array(one.values, dtype=np.float64) / one.tokens for one in runs], axis=0) for runs in read]
        )
        size = nats.shape[1]
        value += _difference(nats.mean(axis=1))
        for start in range(0, RESAMPLES, _AT_ONCE):
            drawn = generator.integers(size, size=(min(_AT_ONCE, RESAMPLES - start), size))
            resampled[start : start + len(drawn)] += _difference(nats[:, drawn].mean(axis=-1))
        count += size
    low, high = np.quantile(resampled / len(ours), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    whole = set(of_row) == set(of_other)
    over = f"{count} windows" + (f" of {len(ours)} texts" if len(ours) > 1 else "") + _told(seeds, whole)
    return Paired("share", float(value) / len(ours), float(low), float(high), over, whole)


def _of_seeds(gap: Gap, of_row: list[Any], seeds: list[Any]) -> tuple[list[dict[str, Scored]], ...]:
    """Windows of some seeds of a row, of their unpermuted models, of all where seeds differ, and of the dense model."""
    places = [place for place, seed in enumerate(of_row) if seed in seeds]
    starts = [gap.start.scored[gap.own[place]] for place in places] if gap.own else gap.start.scored
    return [gap.here.scored[place] for place in places], starts, gap.end.scored


def _told(seeds: list[Any], whole: bool) -> str:
    """Which seeds a difference is of, where one could think of others."""
    if len(seeds) < 2 and whole:
        return ""
    return f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" + " alone" * (not whole)


def _difference(logarithms: NDArray[np.float64]) -> Any:
    """Of the gaps of two rows, from the logarithms of their perplexities: float64 `(6, ...)` to `(...)`."""
    here, start, end, other, its_start, its_end = logarithms
    with np.errstate(divide="ignore", invalid="ignore"):
        return (start - here) / (start - end) - (its_start - other) / (its_start - its_end)


def bootstrap(parts: Sequence[NDArray[np.float64]], resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Means of samples with replacement from each part, averaged over the parts.

    Args:
        parts: float64 vectors, none of them empty.
        resamples: how many.
        seed: of the generator.

    Returns:
        float64 `(resamples,)`.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for part in parts:
        size = len(part)
        values, counts = np.unique(part, return_counts=True)
        few = len(values) * _CHEAPER < size
        for start in range(0, resamples, _AT_ONCE):
            rows = min(_AT_ONCE, resamples - start)
            if few:  # how often each value is drawn is multinomial: fewer numbers than the draws
                means = generator.multinomial(size, counts / size, size=rows) @ values / size
            else:
                means = part[generator.integers(size, size=(rows, size))].mean(axis=1)
            total[start : start + rows] += means
    return total / len(parts)


def _by_seed(row: Row, measure: Measure) -> dict[int, dict[str, Scored]]:
    return {run.config["seed"]: scored for run, scored in zip(row.runs, measure.scored, strict=True)}
