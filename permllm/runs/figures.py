"""The figures of one finished run: what tables and loggers show of `metrics.json`."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from permllm.config import flatten

# The stages that make the pruned model; reconstruction is a part of pruning.
PRUNING_STAGES = ("calibrate", "permute", "mask", "prune")
# lm-eval's name of the accuracy without a filter.
ACC = "acc,none"
# Metrics with a value for each channel group, of which a logger has the mean.
_BY_GROUP = ("retained_saliency", "output_error", "moved_channels")
# Not logged; patterns are those of single linears.
_LEFT_OUT = ("evaluation/", "sha256/", "sparsity/patterns/", "export/patterns/")
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
            before, after = (
                number(one["metrics"].get(metric), one["stderr"].get(metric), metric) for one in (values, sparse[name])
            )
            rows.append((f"{task_label(name, values, metric)}{items}", before, after))
    counted = counted_tasks(dense)
    if len(counted) > 1:
        limited = ", limited" if any(dense[name]["limited"] for name in counted) else ""
        before, after = (number(mean_accuracy(part), mean_error(part), ACC) for part in (dense, sparse))
        rows.append((f"average acc{limited}", before, after))
    return rows


def number(value: float | None, error: float | None, metric: str) -> str:
    """Return a value of a metric of lm-eval with its standard error as it is shown."""
    if value is None:
        return "-"
    if is_share(metric):
        return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


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
    return None if None in errors or not errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)


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
    return sum(differences) / len(differences) if differences else None


def flat_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run as one level, keys joined by slashes.

    A channel group's values are summarised by their mean. `minutes` (`pruning_minutes`) is the horizontal axis of a scatter
    plot, `nats_above_dense` the one number of several texts.
    """
    means = {key: {"mean": statistics.fmean(metrics[key].values())} for key in _BY_GROUP if key in metrics}
    flat = {
        name: value
        for name, value in flatten(metrics | means, "/").items()
        if isinstance(value, int | float | str) and not name.startswith(_LEFT_OUT)
    }
    nats = nats_above_dense(metrics.get("perplexity", {}))
    above = {} if nats is None else {"nats_above_dense": nats}
    return flat | {"minutes": pruning_minutes(metrics["seconds"])} | above
