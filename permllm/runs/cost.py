"""What a row costs, and which rows nothing beats: the picture of quality over minutes, before anything draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from permllm.runs.figures import PRUNING_STAGES, pruning_minutes
from permllm.runs.read import Run
from permllm.runs.table import GAP, LEARNED_TOO, Row, Summary, one_start, row_labels

MINUTES = f"minutes: {' + '.join(PRUNING_STAGES)}"


@dataclass(frozen=True)
class Point:
    """A row in the picture.

    Attributes:
        row: its place in the summary.
        label: its name.
        minutes: of the fastest of its runs (`minutes`).
        value: mean of the measure.
        error: as `Measure.error`.
        memory: as `memory`.
    """

    row: int
    label: str
    minutes: float
    value: float
    error: float
    memory: int


def points(summary: Summary, measure: str) -> list[Point]:
    """Of the rows that have the measure, where it is finite, in their order.

    Rows whose permutation is another run's are left out: the minutes that it took were spent there.
    """
    found = []
    for number, (row, label) in enumerate(zip(summary.rows, row_labels(summary), strict=True)):
        if spent_elsewhere(row):
            continue
        if measure in row.measures and math.isfinite(value := row.measures[measure].mean):
            found.append(Point(number, label, minutes(row), value, row.measures[measure].error, memory(row)))
    return found


def spent_elsewhere(row: Row) -> bool:
    """Whether the permutation is another run's, so that its own minutes say nothing."""
    return bool(row.runs[0].config["permutation"]["name"] == "from_file")


def minutes(row: Row) -> float:
    """Of the stages that make the pruned model, those of the fastest run of a row.

    Seeds do the same work, and whatever else a machine has to do only adds to it: the least is nearest to what the work takes,
    but for what a run found in the cache, such as the calibration of an earlier job.
    """
    return pruning_minutes(_fastest(row).metrics["seconds"])


def memory(row: Row) -> int:
    """The largest peak of memory, in bytes, of those runs whose products are in the format of the fastest one."""
    like = _fastest(row).metrics.get("compute_dtype")
    return max(int(run.metrics["peak_memory_bytes"]) for run in row.runs if run.metrics.get("compute_dtype") == like)


def _fastest(row: Row) -> Run:
    return min(row.runs, key=lambda run: pruning_minutes(run.metrics["seconds"]))


def kind(summary: Summary, measure: str) -> str:
    """As `Measure.kind`."""
    return next(row.measures[measure].kind for row in summary.rows if measure in row.measures)


def lower_is_better(summary: Summary, measure: str) -> bool:
    """Whether of two values of a measure the smaller one is the better one."""
    return kind(summary, measure) not in ("accuracy", "share")


def measures(summary: Summary) -> list[str]:
    """What is worth its minutes: gaps closed, their mean first; perplexities, accuracies. Gaps that do not compare, last."""
    gaps = [name for name in summary.measures if any(name in row.measures and row.measures[name].gaps for row in summary.rows)]
    gaps.sort(key=lambda name: name != GAP)
    others = [name for name in summary.measures if kind(summary, name) in ("perplexity", "accuracy")]
    return gaps + others if one_start(summary) else others + gaps


def methods(summary: Summary) -> list[str]:
    """As `method_of`, of each row; with the pruner, where rows have several."""
    configs = [row.runs[0].config for row in summary.rows]
    pruners = [str(config["pruner"]["name"]) for config in configs]
    several = len(set(pruners)) > 1
    return [f"{pruner}, " * several + method_of(config) for pruner, config in zip(pruners, configs, strict=True)]


def method_of(config: Mapping[str, Any]) -> str:
    """What a run's order, mask and weights come from: the names of those groups that are not as they are by themselves."""
    others = [(str((config.get(group) or {}).get("name", usual)), usual) for group, usual in LEARNED_TOO.items()]
    return ", ".join([str(config["permutation"]["name"]), *(name for name, usual in others if name != usual)])


def front(found: Sequence[Point], lower: bool) -> list[Point]:
    """The Pareto front, by minutes: those points that no other equals or beats in both, and is better in one."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.minutes, point.value if lower else -point.value)):
        if not best or (point.value < best[-1].value if lower else point.value > best[-1].value):
            best.append(point)
    return best
