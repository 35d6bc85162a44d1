"""The figures of one finished run, as they are shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from permllm.runs.evaluations import counted_tasks, is_share, mean_accuracy, mean_error, task_label
from permllm.runtime.terminal import terminal

# The stages that make the pruned model; reconstruction is a part of pruning.
PRUNING_STAGES = ("calibrate", "permute", "mask", "prune")


def print_run(metrics: dict[str, Any], directory: Path, console: Console | None = None) -> None:
    """Table of one finished run: dense and sparse, sparsity, time, memory, and where the files are."""
    console = console or terminal()
    table = Table(title=escape(metrics["name"]), title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    for label, dense, sparse in result_rows(metrics):
        table.add_row(escape(label), dense, sparse)
    console.print(table if table.row_count else "nothing was measured")
    sparsity = metrics["sparsity"]
    console.print(
        f"sparsity  {patterns_text(sparsity)} ({sparsity['fraction']:.2%} zeros, {sparsity['violations']} violations, "
        f"{_mean(metrics['retained_saliency']):.2%} of the saliency retained)"
    )
    stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in metrics["seconds"].items())
    console.print(f"time      {_duration(sum(metrics['seconds'].values()))} ({stages})")
    planned = metrics.get("planned_memory_bytes")
    plan = "" if planned is None else f" ({planned / 1e9:.2f} GB were planned)"
    placed = f", model.placement={where}" if (where := metrics.get("placement", "device")) != "device" else ""
    console.print(f"memory    {metrics['peak_memory_bytes'] / 1e9:.2f} GB at the peak{plan}{placed}")
    console.print(f"files     {directory}", soft_wrap=True)


def patterns_text(sparsity: Mapping[str, Any]) -> str:
    """N:M of `sparsity` of `metrics.json`; where not every linear has it how many are otherwise, and the zeros of all."""
    others = Counter(sparsity.get("patterns", {}).values())
    dense = others.pop("dense", 0)
    parts = [f"{count} {'linear' if count == 1 else 'linears'} {other}" for other, count in sorted(others.items())]
    parts = [sparsity["pattern"], *parts, *([f"{dense} dense"] if dense else [])]
    if len(parts) > 1:
        parts.append(f"{sparsity['of_model']:.2%} zeros over all linears of the decoder layers")
    return ", ".join(parts)


def result_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Every measure of a finished run: its name, the dense model's value and the sparse one's, as they are shown."""
    rows = []
    dense, sparse = metrics.get("perplexity", {}).get("dense", {}), metrics.get("perplexity", {}).get("sparse", {})
    for name, values in dense.items():
        label = f"{name} perplexity (window {values['window']})"
        rows.append((label, f"{values['value']:.2f}", f"{sparse[name]['value']:.2f}"))
    dense, sparse = metrics.get("zero_shot", {}).get("dense", {}), metrics.get("zero_shot", {}).get("sparse", {})
    for name, values in dense.items():
        items = f", {'limited to ' if values['limited'] else ''}{values['n']} items" if values["n"] else ""
        label = f"{name} acc{items}"
        rows.append((label, _accuracy(values), _accuracy(sparse[name])))
    counted = counted_tasks(dense)
    if len(counted) > 1:
        limited = ", limited" if any(dense[name]["limited"] for name in counted) else ""
        before, after = ({"acc": mean_accuracy(part), "stderr": mean_error(part)} for part in (dense, sparse))
        rows.append((f"average acc{limited}", _accuracy(before), _accuracy(after)))
    dense, sparse = metrics.get("tasks", {}).get("dense", {}), metrics.get("tasks", {}).get("sparse", {})
    for name, values in dense.items():
        items = f", {'limited to ' if values['limited'] else ''}{values['n']} items" if values["n"] else ""
        for metric in values["metrics"]:
            rows.append((f"{task_label(name, values, metric)}{items}", _metric(values, metric), _metric(sparse[name], metric)))
    return rows


def _metric(values: dict[str, Any], metric: str) -> str:
    value, error = values["metrics"].get(metric), values["stderr"].get(metric)
    if is_share(metric):
        return _accuracy({"acc": value, "stderr": error})
    return "-" if value is None else f"{value:.4g}{'' if error is None else f' ± {error:.2g}'}"


def _accuracy(values: dict[str, Any]) -> str:
    if values["acc"] is None:
        return "-"
    error = "" if values["stderr"] is None else f" ± {values['stderr']:.1%}"
    return f"{values['acc']:.1%}{error}"


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def pruning_minutes(seconds: Mapping[str, float]) -> float:
    """What making the pruned model took, without loading and evaluation; calibration that another job left takes no time."""
    return sum(seconds.get(stage, 0.0) for stage in PRUNING_STAGES) / 60


def nats_above_dense(perplexity: Mapping[str, Mapping[str, Any]]) -> float | None:
    """How much worse the sparse model predicts a token than the dense one, in nats, the mean over the texts; None for none.

    Args:
        perplexity: as in `metrics.json`.
    """
    dense, sparse = perplexity.get("dense", {}), perplexity.get("sparse", {})
    shared = [name for name in dense if name in sparse]
    differences = [math.log(sparse[name]["value"]) - math.log(dense[name]["value"]) for name in shared]
    return sum(differences) / len(differences) if differences else None  # some may be infinite
