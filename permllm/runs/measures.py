"""The measures of one run, in all ways in which it was evaluated, and how settings and numbers are shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from permllm.runs.figures import ACC, PRUNING_STAGES, counted_tasks, is_share, mean_accuracy, mean_error, task_label

# A measure's name, and facts of how it was measured: the column's name has those in which measures of one name differ.
Key = tuple[str, tuple[str, ...]]

# Groups of methods by their option that does nothing.
METHODS = {"permutation": "none", "mask": "pruner", "reconstruction": "none"}
_FORMATS = {"accuracy": ".2%", "share": ".2%", "error": ".4f", "number": ".4g", "seconds": ".0f"}


@dataclass(frozen=True)
class Scores:
    """Scores behind one number of a run.

    Attributes:
        asked: equal where two runs were asked the same windows of a text, or items of a task.
        values: nats a token of each window, or the score of each item.
    """

    asked: tuple[Any, ...]
    values: list[float]


@dataclass(frozen=True)
class Measure:
    """One number of one run.

    Attributes:
        value: the number.
        kind: `perplexity`, `accuracy`, `share`, `error`, `seconds`, or `number` (another metric of lm-eval).
        stderr: standard error of an accuracy.
        limited: only a part of the windows or items was asked.
        scores: by text or task; empty where they were not kept.
        tasks: tasks that an average is over.
        asked_for: tables have the measure only where `--measures` names it.
    """

    value: float
    kind: str
    stderr: float | None = None
    limited: bool = False
    scores: dict[str, Scores] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    asked_for: bool = False


def measured(metrics: Mapping[str, Any], evaluations: list[dict[str, Any]], model: str, which: str) -> dict[Key, Measure]:
    """Return the measures of a run.

    Args:
        metrics: of the run.
        evaluations: of the run, the one that counts first where two measure the same.
        model: name of the model, which tells windows of two tokenizers apart.
        which: `dense` or `sparse`.
    """
    found: dict[Key, Measure] = {}
    for evaluation in reversed(evaluations):
        found |= _perplexities(evaluation, model, which) | _tasks(evaluation, which)
    if which == "sparse":
        found["saliency retained", ()] = Measure(statistics.fmean(metrics["retained_saliency"].values()), "share")
        found["output error", ()] = Measure(statistics.fmean(metrics["output_error"].values()), "error")
        found["zeros", ()] = Measure(float(metrics["sparsity"]["of_model"]), "share")
        # Calibration may be what an earlier job left.
        seconds = sum(metrics["seconds"].get(stage, 0.0) for stage in PRUNING_STAGES if stage != "calibrate")
        found["seconds", ()] = Measure(seconds, "seconds")
    return found


def _perplexities(evaluation: Mapping[str, Any], model: str, which: str) -> dict[Key, Measure]:
    how = evaluation["evaluation"].get("perplexity", {})
    scores = evaluation.get("scores", {}).get("perplexity", {}).get(which, {})
    found: dict[Key, Measure] = {}
    for text, values in evaluation.get("perplexity", {}).get(which, {}).items():
        window, digest = values["window"], _short(str(evaluation.get("evaluated_texts", {}).get(text, "")))
        begins = "with BOS" if how.get("bos") else "without BOS"
        facts = (f"{values['tokens'] // max(1, window - 1)} windows", begins, f"text {digest}")
        nats = [loss / (window - 1) for loss in scores.get(text, [])]
        kept = {text: Scores((digest, model, window, len(nats)), nats)} if nats else {}
        key = (f"{plain(text)} perplexity (window {window})", facts)
        found[key] = Measure(float(values["value"]), "perplexity", None, how.get("limit") is not None, kept)
    return found


def _tasks(evaluation: Mapping[str, Any], which: str) -> dict[Key, Measure]:
    how = evaluation["evaluation"].get("tasks", {})
    scores = evaluation.get("scores", {}).get("tasks", {}).get(which, {})
    tasks = evaluation.get("tasks", {}).get(which, {})
    found: dict[Key, Measure] = {}
    parts: dict[str, Scores] = {}
    for task, values in tasks.items():
        asked, kept = how.get(values.get("asked")) or {}, scores.get(task, {})
        of_items = (f"{values['n']} items", f"split {plain(str(values.get('split')))}")
        facts = (*of_items, f"add_bos_token={asked.get('add_bos_token')}", f"file {str(asked.get('digest', ''))[:8]}")
        for metric, value in values["metrics"].items():
            share, asked_for = is_share(metric), metric != ACC and ACC in values["metrics"]
            # A metric that is no share need not be a mean over the items.
            each = kept.get("metrics", {}).get(metric) if share else None
            behind = {task: Scores((kept["digest"], tuple(kept["items"])), each)} if each else {}
            parts |= behind if metric == ACC else {}
            if value is not None:
                error, kind = values["stderr"].get(metric), "accuracy" if share else "number"
                measure = Measure(float(value), kind, error, values["limited"], behind, asked_for=asked_for)
                found[plain(task_label(task, values, metric)), facts] = measure
    counted = tuple(counted_tasks(tasks))
    if len(counted) > 1:
        bos = next((task.get("add_bos_token") for task in how.values()), None)
        items = f"{sum(tasks[task]['n'] for task in counted)} items"
        limited = any(tasks[task]["limited"] for task in counted)
        behind = {task: parts[task] for task in counted} if parts.keys() >= {*counted} else {}
        average = Measure(mean_accuracy(tasks), "accuracy", mean_error(tasks), limited, behind, tuple(sorted(counted)))
        found["average acc", (f"of {plain(', '.join(sorted(counted)))}", items, f"add_bos_token={bos}")] = average
    return found


def column_names(keys: list[Key]) -> dict[Key, str]:
    """Return the name of each measure's column: with those facts in which measures of one name differ."""
    facts_of: dict[str, list[tuple[str, ...]]] = {}
    for name, facts in dict.fromkeys(keys):
        facts_of.setdefault(name, []).append(facts)
    differ = {name: [len(set(values)) > 1 for values in zip(*every, strict=True)] for name, every in facts_of.items()}
    return {
        (name, facts): ", ".join([name, *(fact for fact, other in zip(facts, differ[name], strict=True) if other)])
        for name, every in facts_of.items()
        for facts in every
    }


def _short(digest: str) -> str:
    """Return some digits of a text's digest; of a file of the hub the repository and the file without the commit."""
    repository, at, file = plain(digest).partition("@")
    return f"{repository}/{file.partition('/')[2]}" if at else repository[:8]


def plain(text: str) -> str:
    """Return a text of a record without what would break a line or steer a terminal."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def setting_text(value: Any) -> str:
    """Return a setting's value as YAML has it, in one line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return plain(str(value))


def number(value: float, kind: str, error: float | None = None) -> str:
    """Return a number of a kind of measure, with its deviation or standard error, as it is shown."""
    form = _FORMATS.get(kind, ".2f")
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def method_of(config: Mapping[str, Any]) -> str:
    """Return the names of a run's permutation, mask and reconstruction, without mask and reconstruction that do nothing."""
    names = {group: str((config.get(group) or {}).get("name", usual)) for group, usual in METHODS.items()}
    return ", ".join(name for group, name in names.items() if group == "permutation" or name != METHODS[group])
