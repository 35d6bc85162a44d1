"""The figures of one finished run, and tables of runs and jobs on the terminal."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed

from permllm.runtime.terminal import terminal

if TYPE_CHECKING:
    from permllm.runs.table import Table

# The stages that make the pruned model; reconstruction is a part of pruning.
PRUNING_STAGES = ("calibrate", "permute", "mask", "prune")
# lm-eval's name of the accuracy without a filter.
ACC = "acc,none"
_SHARES = ("acc", "acc_norm", "exact_match", "em", "f1", "pass@1")


def patterns_text(sparsity: Mapping[str, Any]) -> str:
    """Return N:M of `sparsity` of `metrics.json`, with the number of linears that have another pattern."""
    others = Counter(sparsity.get("patterns", {}).values())
    dense = others.pop("dense", 0)
    parts = [f"{count} {'linear' if count == 1 else 'linears'} {other}" for other, count in sorted(others.items())]
    parts = [sparsity["pattern"], *parts, *([f"{dense} dense"] if dense else [])]
    if len(parts) > 1:
        parts.append(f"{sparsity['of_model']:.2%} zeros over all linears of the decoder layers")
    return ", ".join(parts)


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return every result of a finished run: its name, the dense model's value and the sparse one's, as they are shown."""
    rows = []
    dense, sparse = (metrics.get("perplexity", {}).get(which, {}) for which in ("dense", "sparse"))
    for name, values in dense.items():
        label = f"{name} perplexity (window {values['window']})"
        rows.append((label, f"{values['value']:.2f}", f"{sparse[name]['value']:.2f}"))
    dense, sparse = (metrics.get("tasks", {}).get(which, {}) for which in ("dense", "sparse"))
    for name, values in dense.items():
        items = f", {'limited to ' if values['limited'] else ''}{values['n']} items" if values["n"] else ""
        for metric in values["metrics"]:
            both = [_result(one["metrics"].get(metric), one["stderr"].get(metric), metric) for one in (values, sparse[name])]
            rows.append((f"{task_label(name, values, metric)}{items}", *both))
    counted = counted_tasks(dense)
    if len(counted) > 1:
        limited = ", limited" if any(dense[name]["limited"] for name in counted) else ""
        both = [_result(mean_accuracy(part), mean_error(part), ACC) for part in (dense, sparse)]
        rows.append((f"average acc{limited}", *both))
    return rows


def _result(value: float | None, error: float | None, metric: str) -> str:
    """Return a value of a metric of lm-eval with its standard error as it is shown."""
    if value is None:
        return "-"
    form, of_error = (".1%", ".1%") if is_share(metric) else (".4g", ".2g")
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{of_error}}")


def task_label(task: str, values: Mapping[str, Any], metric: str) -> str:
    """Return the name of a metric of a task: `gsm8k exact_match strict-match (5 shots)`; a filter where there are several."""
    name, _, how = metric.partition(",")
    several = sum(other.partition(",")[0] == name for other in values["metrics"]) > 1
    shots = values.get("num_fewshot")
    asked = f" ({shots} shot{'' if shots == 1 else 's'})" if shots else ""
    return f"{task} {name}{f' {how}' if several else ''}{asked}"


def is_share(metric: str) -> bool:
    """Tell whether a metric of lm-eval is a share of the items, which is shown in per cent."""
    return metric.partition(",")[0] in _SHARES


def counted_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the tasks of a result that the average accuracy is over: those with items of their own and an accuracy."""
    return [name for name, values in tasks.items() if values["n"] and values["metrics"].get(ACC) is not None]


def mean_accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the mean accuracy over the counted tasks of a result; not a number where there is none."""
    counted = counted_tasks(tasks)
    return statistics.fmean(tasks[name]["metrics"][ACC] for name in counted) if counted else math.nan


def mean_error(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the standard error of `mean_accuracy`, the tasks being independent; None where that of one is not known."""
    errors = [tasks[name]["stderr"].get(ACC) for name in counted_tasks(tasks)]
    return None if None in errors or not errors else math.hypot(*errors) / len(errors)


def pruning_minutes(seconds: Mapping[str, float]) -> float:
    """Return the minutes of making the pruned model, without loading and evaluation; a cached calibration takes no time."""
    return sum(seconds.get(stage, 0.0) for stage in PRUNING_STAGES) / 60


def nats_above_dense(perplexity: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the sparse model's log-perplexity less the dense one's, the mean over the texts; None where there is none.

    Args:
        perplexity: as in `metrics.json`.
    """
    dense, sparse = perplexity.get("dense", {}), perplexity.get("sparse", {})
    differences = [math.log(sparse[name]["value"]) - math.log(dense[name]["value"]) for name in dense if name in sparse]
    return statistics.fmean(differences) if differences else None


def print_run(metrics: dict[str, Any], directory: Path, console: Console | None = None) -> None:
    """Print one finished run: dense and sparse, sparsity, time, memory, and where the files are."""
    console = console or terminal()
    table = Printed("", title=escape(metrics["name"]), title_justify="left")
    for which in ("dense", "sparse"):
        table.add_column(which, justify="right")
    for label, *values in result_rows(metrics):
        table.add_row(escape(label), *values)
    console.print(table if table.row_count else "nothing was measured")
    sparsity, seconds = metrics["sparsity"], metrics["seconds"]
    retained = statistics.fmean(metrics["retained_saliency"].values())
    counts = f"{sparsity['fraction']:.2%} zeros, {sparsity['violations']} violations"
    console.print(f"sparsity  {patterns_text(sparsity)} ({counts}, {retained:.2%} of the saliency retained)")
    stages = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
    console.print(f"time      {_duration(sum(seconds.values()))} ({stages})")
    planned = metrics.get("planned_memory_bytes")
    plan = "" if planned is None else f" ({planned / 1e9:.2f} GB were planned)"
    placed = f", model.placement={where}" if (where := metrics.get("placement", "device")) != "device" else ""
    console.print(f"memory    {metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak{plan}{placed}")
    console.print(f"files     {directory}", soft_wrap=True)


def print_comparison(table: Table, console: Console | None = None) -> None:
    """Print several finished runs: a column for each row of their table, after the dense model's where all share it."""
    printed = Printed("", title="sparse models", title_justify="left")
    if table.dense:
        printed.add_column("dense", justify="right")
    for row, label in enumerate(table.names()):
        seeds = f"\n{len(table.rows[row])} seeds" if len(table.rows[row]) > 1 else ""
        printed.add_column(escape(label) + seeds, justify="right", overflow="fold")
    for name in table.measures:
        dense = [table.shown_dense(name)] * bool(table.dense)
        cells = [table.shown(row, name) or "-" for row in range(len(table.rows))]
        printed.add_row(escape(table.heading(name)), *dense, *cells)
    (console or terminal()).print(printed)


def print_jobs(jobs: Sequence[tuple[str, str, str]], console: Console | None = None) -> None:
    """Print what became of the jobs of a sweep, `(label, outcome, directory or reason)`, and how many of each."""
    console = console or terminal()
    table = Printed(title="jobs", title_justify="left")
    for title in ("job", "outcome", "run, or reason"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        table.add_row(*map(escape, job))
    console.print(table)
    counts = Counter(outcome for _, outcome, _ in jobs)
    console.print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ran", "skipped", "failed") if counts[outcome]))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
