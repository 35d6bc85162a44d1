"""Measures of one run, from `metrics.json` and the evaluations, and their text in tables."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from permllm.settings.config import flatten

# Name of a measure, facts about how it was measured, and the model whose tokens were measured, or
# nothing. If measures of one name and model differ in facts, these facts are part of the columns'
# names. An empty fact is not known.
Key = tuple[str, tuple[str, ...], str]
# Identity of the windows of a text or the items of a task, which is equal if two runs were measured
# on the same ones; and a number for each window (nats per token) or item (its score).
Scores = tuple[tuple[Any, ...], list[float]]

# Metrics with a value for each channel group. Loggers get their mean.
_BY_GROUP = ("retained_saliency", "output_error", "moved_channels")
# Metrics that loggers do not get, because the settings have them in a shorter form.
_LEFT_OUT = ("evaluation/", "sha256/", "sparsity/patterns/", "export/patterns/", "export/sha256/")
# Stages that make the pruned model. Reconstruction is part of `prune`.
PRUNING_STAGES = ("calibrate", "permute", "mask", "prune")
# lm-eval's name of the accuracy without a filter.
ACC = "acc,none"
_SHARES = ("acc", "acc_norm", "exact_match", "em", "f1", "pass@1")
# Suffix of the names of measures with `evaluation.weights=fp8`.
FP8 = " in fp8"
# Groups of methods, with the option that does nothing.
METHODS = {"permutation": "none", "mask": "pruner", "reconstruction": "none"}
# With "z" a mean that rounding leaves just below zero is shown without a minus.
_FORMATS = {"accuracy": ".2%", "share": "z.2%", "error": ".4f", "number": ".4g", "seconds": ".0f"}


@dataclass(frozen=True)
class Measure:
    """Number of one run, with its kind and the scores behind it.

    Attributes:
        value: the number.
        kind: `perplexity`, `accuracy`, `share`, `error`, `seconds`, or `number` (another metric of
            lm-eval).
        stderr: standard error of an accuracy; None: not known.
        limited: True: measured on only a part of the windows or items.
        items: number of items of an accuracy.
        scores: scores of windows or items, by text or task; empty: they were not kept.
        tasks: tasks of an average.
        asked_for: True: tables show the measure only if `--measures` names it.
    """

    value: float
    kind: str
    stderr: float | None = None
    limited: bool = False
    items: int | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    asked_for: bool = False


def measured(
    metrics: Mapping[str, Any], evaluations: list[dict[str, Any]], model: str, which: str
) -> dict[Key, Measure]:
    """Return the measures of a run's `dense` or `sparse` model.

    If two evaluations have the same measure, the first one counts. The name of the model is part of
    the identity of windows, because models have different tokenizers.
    """
    measures: dict[Key, Measure] = {}
    for evaluation in reversed(evaluations):
        measures |= _perplexities(evaluation, model, which) | _tasks(evaluation, which)
    if which == "sparse":
        retained = metrics["retained_saliency"]
        errors = metrics["output_error"]
        # Without calibration, whose result may come from the cache.
        seconds = sum(metrics["seconds"].get(stage, 0.0) for stage in PRUNING_STAGES[1:])
        measures |= {
            ("saliency retained", (), ""): Measure(statistics.fmean(retained.values()), "share"),
            ("output error", (), ""): Measure(statistics.fmean(errors.values()), "error"),
            ("zeros", (), ""): Measure(float(metrics["sparsity"]["of_model"]), "share"),
            ("seconds", (), ""): Measure(seconds, "seconds"),
        }
    return measures


def _perplexities(evaluation: Mapping[str, Any], model: str, which: str) -> dict[Key, Measure]:
    settings = evaluation.get("evaluation", {}).get("perplexity", {})
    rounding = _rounding(evaluation)
    losses = evaluation.get("scores", {}).get("perplexity", {}).get(which, {})
    windows_of = {
        name: key
        for key, names in evaluation.get("measured", {}).get(which, {}).items()
        for name in names
        if key.startswith("perplexity/")
    }
    begins = "with BOS" if settings.get("bos") else "without BOS"
    measures: dict[Key, Measure] = {}
    for text, values in evaluation.get("perplexity", {}).get(which, {}).items():
        window = values["window"]
        digest = _short(str(evaluation.get("evaluated_texts", {}).get(text, "")))
        # A wheel's digest does not tell which of its passages were read. The key of the measure
        # ends in the digest of the windows; records of version 1 have no keys.
        windows = str(windows_of.get(text, "")).split("/")
        facts = (
            f"{values['tokens'] // max(1, window - 1)} windows",
            begins,
            f"text {digest}",
            f"windows {windows[3][:8]}" if len(windows) > 3 else "",
        )
        nats = [loss / (window - 1) for loss in losses.get(text, [])]
        identity = (windows_of.get(text, digest), model, window, len(nats))
        scores = {text: (identity, nats)} if nats else {}
        measures[f"{plain(text)} perplexity (window {window}){rounding}", facts, model] = Measure(
            float(values["value"]),
            "perplexity",
            limited=settings.get("limit") is not None,
            scores=scores,
        )
    return measures


def _tasks(evaluation: Mapping[str, Any], which: str) -> dict[Key, Measure]:
    settings = evaluation.get("evaluation", {}).get("tasks", {})
    rounding = _rounding(evaluation)
    scores = evaluation.get("scores", {}).get("tasks", {}).get(which, {})
    tasks = evaluation.get("tasks", {}).get(which, {})
    measures: dict[Key, Measure] = {}
    accuracies: dict[str, Measure] = {}
    for task, values in tasks.items():
        task_settings = settings.get(values.get("asked")) or {}
        task_scores = scores.get(task, {})
        items = values["n"]
        facts = (
            f"{items} items",
            f"split {plain(str(values.get('split')))}",
            f"add_bos_token={task_settings.get('add_bos_token')}",
            f"file {str(task_settings.get('digest', ''))[:8]}",
        )
        for metric, value in values["metrics"].items():
            if value is None:
                continue
            # Other metrics may not be means over the items, so that their scores are not used.
            kind = "accuracy" if metric.partition(",")[0] in _SHARES else "number"
            by_task = {}
            if kind == "accuracy" and task_scores.get("metrics", {}).get(metric):
                identity = (task_scores["digest"], tuple(task_scores["items"]))
                by_task[task] = (identity, task_scores["metrics"][metric])
            measure = Measure(
                float(value),
                kind,
                values["stderr"].get(metric),
                values["limited"],
                items,
                by_task,
                asked_for=metric != ACC and ACC in values["metrics"],
            )
            measures[plain(task_label(task, values, metric)) + rounding, facts, ""] = measure
            if metric == ACC:
                accuracies[task] = measure
    counted, mean, error = average_accuracy(tasks)
    if len(counted) > 1:
        averaged = [accuracies[task] for task in counted]
        items = sum(accuracy.items or 0 for accuracy in averaged)
        bos = next((task.get("add_bos_token") for task in settings.values()), None)
        names = plain(", ".join(sorted(counted)))
        average_facts = (f"of {names}", f"{items} items", f"add_bos_token={bos}")
        all_scores: dict[str, Scores] = {}
        if all(accuracy.scores for accuracy in averaged):
            for accuracy in averaged:
                all_scores |= accuracy.scores
        measures[f"average acc{rounding}", average_facts, ""] = Measure(
            mean,
            "accuracy",
            error,
            any(accuracy.limited for accuracy in averaged),
            items,
            all_scores,
            tuple(sorted(counted)),
        )
    return measures


def _rounding(evaluation: Mapping[str, Any]) -> str:
    """Return the suffix of the names of an evaluation's measures."""
    return FP8 if evaluation.get("evaluation", {}).get("weights") == "fp8" else ""


def column_names(keys: list[Key]) -> dict[Key, str]:
    """Return the column of each measure: its name, and facts that differ among equal names."""
    facts_of: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for name, facts, model in keys:
        facts_of.setdefault((name, model), []).append(facts)
    columns = {}
    for name, facts, model in keys:
        differing = []
        for fact, others in zip(facts, zip(*facts_of[name, model], strict=True), strict=True):
            if fact and len({*others} - {""}) > 1:
                differing.append(fact)
        columns[name, facts, model] = ", ".join([name, *differing])
    return columns


def _short(digest: str) -> str:
    """Return eight digits of a text's digest, or `repository/file` for a file of the hub."""
    repository, at, file = plain(digest).partition("@")
    return f"{repository}/{file.partition('/')[2]}" if at else repository[:8]


def plain(text: str) -> str:
    """Return a text of a record in one line, without characters that would control a terminal."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())


def setting_text(value: Any) -> str:
    """Return the value of a setting as in YAML, in one line."""
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else plain(str(value))


def number(value: float, kind: str, error: float | None = None) -> str:
    """Return the text of a number and its error for a kind of measure."""
    form = _FORMATS.get(kind, ".2f")
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def method_of(config: Mapping[str, Any]) -> str:
    """Return a run's permutation, and its mask and reconstruction unless they do nothing."""
    names = [str(config["permutation"]["name"])]
    for group in ("mask", "reconstruction"):
        name = str((config.get(group) or {}).get("name", METHODS[group]))
        if name != METHODS[group]:
            names.append(name)
    return ", ".join(names)


def patterns_text(sparsity: Mapping[str, Any]) -> str:
    """Return N:M of a run, with the number of linears that have another pattern."""
    others = Counter(sparsity.get("patterns", {}).values())
    dense = others.pop("dense", 0)
    parts = [sparsity["pattern"]]
    for name, count in sorted(others.items()):
        linears = "linears" if count > 1 else "linear"
        parts.append(f"{count} {linears} {name}")
    if dense:
        parts.append(f"{dense} dense")
    zeros = f"{sparsity['of_model']:.2%} zeros over all linears of the decoder layers"
    if len(parts) > 1:
        parts.append(zeros)
    return ", ".join(parts)


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each result of a run as texts: name, dense value, sparse value."""
    dense = _perplexities(metrics, "", "dense") | _tasks(metrics, "dense")
    sparse = _perplexities(metrics, "", "sparse") | _tasks(metrics, "sparse")
    rows = []
    for key, measure in (dense | sparse).items():
        limited = "limited to " if measure.limited else ""
        name = f"{key[0]}, {limited}{measure.items} items" if measure.items else key[0]
        texts = []
        for measures in (dense, sparse):
            if key in measures:
                texts.append(number(measures[key].value, measure.kind, measures[key].stderr))
            else:
                texts.append("-")
        rows.append((name, texts[0], texts[1]))
    return rows


def task_label(task: str, values: Mapping[str, Any], metric: str) -> str:
    """Return a metric's name, with its filter if it has several: `gsm8k em strict (5 shots)`."""
    name, _, filter_name = metric.partition(",")
    several = sum(other.partition(",")[0] == name for other in values["metrics"]) > 1
    label = f"{task} {name} {filter_name}" if several else f"{task} {name}"
    shots = values.get("num_fewshot")
    if shots:
        label += f" ({shots} shot)" if shots == 1 else f" ({shots} shots)"
    return label


def average_accuracy(
    tasks: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], float, float | None]:
    """Return the tasks that have items and an accuracy, their mean accuracy and its standard error.

    The error assumes independent tasks. It is None if the error of a task is not known. Without a
    task the mean is NaN.
    """
    counted = [
        name for name, task in tasks.items() if task["n"] and task["metrics"].get(ACC) is not None
    ]
    if not counted:
        return [], math.nan, None
    errors = [tasks[name]["stderr"].get(ACC) for name in counted]
    mean = statistics.fmean(tasks[name]["metrics"][ACC] for name in counted)
    return counted, mean, None if None in errors else math.hypot(*errors) / len(errors)


def pruning_minutes(seconds: Mapping[str, float]) -> float:
    """Return the minutes of the stages that make the pruned model. A cache hit takes none."""
    return sum(seconds.get(stage, 0.0) for stage in PRUNING_STAGES) / 60


def flat_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a finished run as one level, with slashes in their names.

    Metrics of channel groups are replaced by their mean. Two numbers are added: `minutes`
    (`pruning_minutes`), and `nats_above_dense`, the mean of `ln sparse - ln dense` over the texts.
    """
    means = {key: {"mean": statistics.fmean(metrics[key].values())} for key in _BY_GROUP}
    flat = {
        name: value
        for name, value in flatten(metrics | means, "/").items()
        if isinstance(value, int | float | str) and not name.startswith(_LEFT_OUT)
    }
    flat["minutes"] = pruning_minutes(metrics["seconds"])
    perplexity = metrics.get("perplexity", {})
    dense = perplexity.get("dense", {})
    sparse = perplexity.get("sparse", {})
    if both := dense.keys() & sparse.keys():
        above = [math.log(sparse[name]["value"]) - math.log(dense[name]["value"]) for name in both]
        flat["nats_above_dense"] = statistics.fmean(above)
    return flat
