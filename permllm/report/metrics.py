"""Metrics of one run, from `metrics.json` and the evaluations, and their text in tables."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from permllm.settings.config import NEUTRAL_OPTIONS
from permllm.settings.values import flatten
from permllm.store.files import RECORD

# Identity of the windows of a text or the items of a task, which is equal if two runs were measured
# on the same ones; and a number for each window (nats per token) or item (its score).
Scores = tuple[tuple[Any, ...], list[float]]

# Metrics with a value for each channel group. Loggers get their mean.
_BY_GROUP = {"sensitivity", "retained_saliency", "output_error", "moved_channels"}
# Metrics that loggers do not get, because they have them by other names.
_LEFT_OUT = ("peak_memory_bytes", "evaluation/", "sha256/", "sparsity/patterns/", "export/")
# Phases that make the pruned model. Reconstruction is part of `prune`.
PRUNING_PHASES = ("calibrate", "allocate", "permute", "mask", "prune")
# lm-eval's name of the accuracy without a filter.
ACC = "acc,none"
_SHARES = ("acc", "acc_norm", "exact_match", "em", "f1", "pass@1")
# Suffix of the names of metrics with `evaluation.weights=fp8`.
FP8 = " in fp8"
PERPLEXITY = " perplexity ("
AVERAGE = "average acc"
# Metrics that are the same for all runs of one pattern without dense linears.
ZEROS = "zeros"
DENSE_WEIGHTS = "dense weights"
SPEED_LIMIT = "speed limit"
SECONDS = "seconds"
OF_SPARSITY = (ZEROS, DENSE_WEIGHTS, SPEED_LIMIT)
# Facts about how metrics were measured. Facts in which metrics of one name and model differ are
# part of the names of their columns.
FACTS = ["windows", "beginning", "passages", "tasks", "items", "source", "shots", "bos", "file"]
# With "z" a mean that rounding leaves just below zero is shown without a minus.
_FORMATS = {"accuracy": ".2%", "share": "z.2%", "error": ".4f", "number": ".4g", "seconds": ".0f"}


@dataclass(frozen=True)
class Metric:
    """Number of a model, with the scores behind it.

    Attributes:
        name: name in tables.
        kind: `perplexity`, `accuracy`, `share`, `error`, `seconds`, or `number` (another metric of
            lm-eval).
        value: the number.
        facts: texts about how it was measured, by keys of `FACTS`; None: not known.
        tokenizer: name of the model whose tokens were measured; empty: no tokens of a model.
        stderr: standard error of an accuracy; None: not known.
        limited: True: measured on only a part of the windows or items.
        items: number of items of an accuracy.
        scores: scores of windows or items, by text or task; empty: they were not kept.
        asked_for: True: tables show the metric only if `--metrics` names it.
        dense: the same metric of the dense model; None: it has none.
    """

    name: str
    kind: str
    value: float
    facts: dict[str, str | None] = field(default_factory=dict)
    tokenizer: str = ""
    stderr: float | None = None
    limited: bool = False
    items: int | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    asked_for: bool = False
    dense: Metric | None = None

    @property
    def text(self) -> str:
        """Return the number and its error."""
        return number(self.value, self.kind, self.stderr)


def run_metrics(
    metrics: Mapping[str, Any], evaluations: list[dict[str, Any]], model: str
) -> list[Metric]:
    """Return the metrics of a run's pruned model, each with that of its dense model.

    If two evaluations have the same metric, the first one counts. The name of the model is part of
    the identity of windows, because models have different tokenizers.
    """
    results: dict[tuple[Any, ...], Metric] = {}
    for evaluation in reversed(evaluations):
        for result in evaluation_metrics(evaluation, model):
            results[result.name, *result.facts.values()] = result
    retained = statistics.fmean(metrics["retained_saliency"].values())
    error = statistics.fmean(metrics["output_error"].values())
    # Without calibration and allocation, whose results may come from the cache.
    seconds = sum(metrics["seconds"].get(phase, 0.0) for phase in PRUNING_PHASES[2:])
    zeros = float(metrics["sparsity"]["of_model"])
    return [
        *results.values(),
        Metric("saliency retained", "share", retained),
        Metric("output error", "error", error),
        Metric(ZEROS, "share", zeros),
        Metric(DENSE_WEIGHTS, "share", 1 - zeros / metrics["sparsity"]["fraction"]),
        # Of kernels that skip all zeros: a product takes the time of its nonzeros.
        Metric(SPEED_LIMIT, "number", 1 / (1 - zeros)),
        Metric(SECONDS, "seconds", seconds),
    ]


def evaluation_metrics(evaluation: Mapping[str, Any], model: str) -> list[Metric]:
    """Return the perplexities, the metrics of tasks and the average accuracy of an evaluation."""
    dense = {result.name: result for result in _of_model(evaluation, model, "dense")}
    return [
        replace(result, dense=dense.get(result.name))
        for result in _of_model(evaluation, model, "sparse")
    ]


def _of_model(evaluation: Mapping[str, Any], model: str, which: str) -> list[Metric]:
    results = _perplexities(evaluation, model, which)
    accuracies = {}
    for task, values in _part(evaluation, "tasks", which).items():
        settings = evaluation["evaluation"]["tasks"][values["asked"]]
        metrics = _task(task, values, settings, _part(evaluation, "scores", "tasks", which, task))
        results += metrics.values()
        if ACC in metrics and values["n"]:
            accuracies[values["asked"], task] = metrics[ACC]
    if len(accuracies) > 1:
        results.append(_average(accuracies))
    ending = FP8 if "weights" in _part(evaluation, "evaluation") else ""
    return [replace(result, name=f"{result.name}{ending}") for result in results]


def _part(values: Mapping[str, Any], *keys: Any) -> Any:
    """Return a part of nested values; empty: there is none."""
    for key in keys:
        values = values.get(key, {})
    return values


def _perplexities(evaluation: Mapping[str, Any], model: str, which: str) -> list[Metric]:
    settings = _part(evaluation, "evaluation", "perplexity")
    losses = _part(evaluation, "scores", "perplexity", which)
    keys = {
        name: key
        for key, names in _part(evaluation, "measured", which).items()
        for name in names
        if key.startswith("perplexity/")
    }
    results = []
    for text, values in _part(evaluation, "perplexity", which).items():
        window = values["window"]
        key = keys.get(text)  # it has the digest of the windows; old records have no keys
        facts = {
            "windows": f"{values['tokens'] // (window - 1)} windows",
            "beginning": "with BOS" if settings.get("bos") else "without BOS",
            "passages": f"windows {key.split('/')[3][:8]}" if key else None,
        }
        result = Metric(
            f"{plain(text)}{PERPLEXITY}window {window})",
            "perplexity",
            float(values["value"]),
            facts,
            model,
            limited=settings.get("limit") is not None,
        )
        if text in losses:
            nats = [loss / (window - 1) for loss in losses[text]]
            # Old records differ in the revision of a file of the hub.
            identity = key or re.sub("@[^/]*", "", evaluation["evaluated_texts"][text])
            result.scores[text] = ((identity, model, window, len(nats)), nats)
        results.append(result)
    return results


def _task(
    task: str, values: Mapping[str, Any], settings: Mapping[str, Any], scores: Mapping[str, Any]
) -> dict[str, Metric]:
    facts: dict[str, str | None] = {
        "items": f"{values['n']} items",
        "source": f"of the {settings.get('source', 'hub')}",
        "shots": f"{values['num_fewshot'] or 0}-shot",
        "bos": f"add_bos_token={settings['add_bos_token']}",
        "file": f"file {settings.get('digest', '')[:8]}",
    }
    shots = f" ({values['num_fewshot']}-shot)" if values["num_fewshot"] else ""
    results = {}
    for metric, value in values["metrics"].items():
        if value is None:
            continue
        result = Metric(
            plain(f"{task} {metric.removesuffix(',none').replace(',', ' ')}{shots}"),
            "accuracy" if metric.partition(",")[0] in _SHARES else "number",
            float(value),
            facts,
            stderr=values["stderr"].get(metric),
            limited=values["limited"],
            items=values["n"],
            asked_for=metric != ACC and ACC in values["metrics"],
        )
        item_scores = _part(scores, "metrics", metric)
        # Other metrics may not be means over the items, so that their scores are not used.
        if item_scores and result.kind == "accuracy":
            result.scores[task] = ((scores["digest"], *scores["items"]), item_scores)
        results[metric] = result
    return results


def _average(accuracies: dict[tuple[str, str], Metric]) -> Metric:
    """Return the average of the accuracies of tasks. Its error assumes independent tasks.

    Args:
        accuracies: by the task that was asked for and its subtask, which have equal weight in it.
    """
    results = accuracies.values()
    counts = Counter(task for task, _ in accuracies)
    weights = np.array([1 / counts[task] / len(counts) for task, _ in accuracies])
    values = np.array([result.value for result in results])
    errors = np.array([result.stderr for result in results], dtype=float)  # None becomes NaN
    items = sum(result.items or 0 for result in results)
    facts: dict[str, str | None] = {
        fact: ", ".join(dict.fromkeys(str(result.facts[fact]) for result in results))
        for fact in ("source", "shots", "bos", "file")
    }
    average = Metric(
        AVERAGE,
        "accuracy",
        float(weights @ values),
        facts | {"tasks": f"of {plain(', '.join(sorted(counts)))}", "items": f"{items} items"},
        stderr=math.hypot(*(weights * errors)),
        limited=any(result.limited for result in results),
        items=items,
    )
    # An interval gives all tasks the same weight.
    if all(result.scores for result in results) and len(counts) == len(accuracies):
        for result in results:
            average.scores.update(result.scores)
    return average


def plain(text: str) -> str:
    """Return a text of a record in one line, without characters that would control a terminal."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())


def setting_text(value: Any) -> str:
    """Return the value of a setting as in YAML, in one line."""
    if isinstance(value, list):
        return ", ".join(map(setting_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else plain(str(value))


def number(value: float, kind: str, error: float | None = None) -> str:
    """Return the text of a number and its error for a kind of metric; None or NaN: no error."""
    form = _FORMATS.get(kind, ".2f")
    text = f"{value:{form}}"
    return text if error is None or math.isnan(error) else f"{text} ± {error:{form}}"


def change_text(change: float, kind: str, interval: list[float] | None = None) -> str:
    """Return the text of a change in a kind of metric; empty: it is not finite."""
    if not math.isfinite(change):
        return ""
    unit = " points" if kind in ("accuracy", "share") else "%"
    text = f"{change * 100:+.1f}{unit}"
    if interval is None:
        return text
    low, high = interval
    return f"{text} [{low * 100:+.1f}, {high * 100:+.1f}]"


def method_of(config: Mapping[str, Any]) -> str:
    """Return a run's permutation, and its other methods unless they do nothing."""
    names = [config["permutation"]["name"]]
    for group, idle in NEUTRAL_OPTIONS.items():
        name = config.get(group, {}).get("name", idle)
        if name != idle:
            names.append(name)
    return ", ".join(names)


def sparsity_text(sparsity: Mapping[str, Any]) -> str:
    """Return N:M of a run, with the number of linears that stay dense."""
    pattern: str = sparsity["pattern"]
    dense = len(sparsity.get("patterns", {}))
    if not dense:
        return pattern
    zeros = f"{sparsity['of_model']:.2%} zeros over all linears of the decoder layers"
    return f"{pattern}, {dense} dense, {zeros}"


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each result of a run as texts: name, dense value, sparse value."""
    rows = []
    for result in evaluation_metrics(metrics, ""):
        limited = "limited to " if result.limited else ""
        items = f", {limited}{result.items} items" if result.items else ""
        dense = result.dense.text if result.dense else "-"
        rows.append((result.name + items, dense, result.text))
    return rows


def mean_accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the mean accuracy of the tasks that were asked for; NaN: there is none.

    The accuracy of a task with subtasks is the mean of theirs.
    """
    accuracies = defaultdict(list)
    for task in tasks.values():
        if task["n"] and task["metrics"].get(ACC) is not None:
            accuracies[task["asked"]].append(task["metrics"][ACC])
    return statistics.fmean(map(statistics.fmean, accuracies.values())) if accuracies else math.nan


def objective(metrics: dict[str, Any]) -> float:
    """Return the number that a search minimises: the perplexity of the sparse model.

    With several texts it is their geometric mean, without a text 1 - mean accuracy, and without a
    task too infinity.
    """
    texts = _part(metrics, "perplexity", "sparse")
    perplexities = [float(values["value"]) for values in texts.values()]
    if perplexities:
        return math.prod(perplexities) ** (1 / len(perplexities))
    accuracy = mean_accuracy(_part(metrics, "tasks", "sparse"))
    return math.inf if math.isnan(accuracy) else 1 - accuracy


def pruning_minutes(seconds: Mapping[str, float]) -> float:
    """Return the minutes of the phases that make the pruned model. A cache hit takes none."""
    return sum(seconds.get(phase, 0.0) for phase in PRUNING_PHASES) / 60


def flat_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a finished run as one level, for a logger.

    First come `perplexity/TEXT` of the sparse model; `nats_above_dense`, the mean of
    `ln sparse - ln dense` over the texts; `accuracy`, the mean over the tasks; `minutes`
    (`pruning_minutes`); `peak_memory_gb`. All other values follow as `record/...`, with the mean
    over channel groups in place of their values.
    """
    means = {
        key: {"mean": statistics.fmean(metrics[key].values())} for key in _BY_GROUP & metrics.keys()
    }
    flat: dict[str, Any] = {}
    dense = _part(metrics, "perplexity", "dense")
    above = []
    for text, values in _part(metrics, "perplexity", "sparse").items():
        flat[f"perplexity/{text}"] = values["value"]
        above.append(math.log(values["value"]) - math.log(dense[text]["value"]))
    accuracy = mean_accuracy(_part(metrics, "tasks", "sparse"))
    if above:
        flat["nats_above_dense"] = statistics.fmean(above)
    if not math.isnan(accuracy):
        flat["accuracy"] = accuracy
    flat["minutes"] = pruning_minutes(metrics["seconds"])
    flat["peak_memory_gb"] = metrics["peak_memory_bytes"] / 1e9
    for name, value in flatten(metrics | means, "/").items():
        has_a_name = re.fullmatch("perplexity/sparse/[^/]+/value", name)
        if isinstance(value, int | float | str) and not (has_a_name or name.startswith(_LEFT_OUT)):
            flat[f"{RECORD}/{name}"] = value
    return flat
