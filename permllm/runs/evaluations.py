"""A pruned model may be evaluated in several ways, and its record holds all of them.

The one that was asked for last stands at the top of `metrics.json`: how it was made under `evaluation`
(`permllm.config.evaluation_of`), its results under `perplexity`, `zero_shot` and `tasks`, the digest of its text in `texts`
(of several, a digest of each by its name), its settings in `protocol`. The others have the same keys in their entries of
`other_evaluations`, and `finished`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from permllm.config import digest_of

_OTHERS, _FINISHED = "other_evaluations", "finished"
_OWN = ("evaluation", "evaluation_hash", "perplexity", "zero_shot", "tasks")
# Of keys that stand for calibration too, the part that is the evaluation's.
_SHARED = {"texts": "perplexity", "protocol": "evaluation"}


def head(evaluation: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of an evaluation begins with.

    Args:
        evaluation: how it is made.
        settings: the group `evaluation`, resolved.
    """
    how = dict(evaluation)
    return {"evaluation": how, "evaluation_hash": digest_of(how), "protocol": {"evaluation": dict(settings)}}


def others(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of all other evaluations that are finished."""
    return [entry for entry in metrics.get(_OTHERS, []) if entry[_FINISHED]]


def all_of(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of all evaluations of a finished run, the one at the top first."""
    return [metrics, *others(metrics)]


def of_text(entry: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """How an evaluation measures perplexity on a text, as one of this text alone has it; None where it does not."""
    how = entry["evaluation"].get("perplexity")
    if how is None or not isinstance(how.get("dataset"), list):
        return None if how is None else dict(how)
    asked = next((text for text in how["dataset"] if text.rpartition(".")[2] == name), None)
    return None if asked is None else how | {"dataset": asked}


def note_text(entry: dict[str, Any], name: str, digest: str) -> None:
    """Keep the digest of a text that perplexity is measured on: one for all, or where there are several by name."""
    several = isinstance(entry["evaluation"]["perplexity"].get("dataset"), list)
    texts = entry.setdefault("texts", {})
    texts["perplexity"] = {**texts.get("perplexity", {}), name: digest} if several else digest


def text_digest(entry: Mapping[str, Any], name: str) -> str:
    """Return the digest of a text that perplexity was measured on; empty where none was kept."""
    found = entry.get("texts", {}).get("perplexity", "")
    return str(found.get(name, "") if isinstance(found, Mapping) else found)


def not_held(metrics: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations among these that a record does not have."""
    held = [entry["evaluation"] for entry in all_of(metrics)]
    return [entry for entry in entries if entry["evaluation"] not in held]


def merge(metrics: dict[str, Any], entries: list[Mapping[str, Any]]) -> bool:
    """Add evaluations from another record of the same pruned model that this one does not hold; whether there were any.

    Each keeps the `config_hash` of the record that it is from.
    """
    new = [dict(entry) for entry in not_held(metrics, entries)]
    source = {"config_hash": entries[0]["config_hash"], _FINISHED: True}
    metrics[_OTHERS] = [*metrics.get(_OTHERS, []), *(_taken(entry) | source for entry in new)]
    return bool(new)


def entry_for(metrics: dict[str, Any], begun: dict[str, Any]) -> dict[str, Any]:
    """The entry of another evaluation than the one at the top, which begins as `begun` where there is none yet."""
    entries: list[dict[str, Any]] = metrics.setdefault(_OTHERS, [])
    for entry in entries:
        if entry["evaluation"] == begun["evaluation"]:
            return entry
    entries.append(begun | {_FINISHED: False})
    return entries[-1]


def forget(metrics: dict[str, Any]) -> None:
    """Remove all results: those at the top, of which how they are to be made stays, and the other evaluations."""
    for key in ("perplexity", "zero_shot", "tasks", _OTHERS):
        metrics.pop(key, None)
    metrics.get("texts", {}).pop("perplexity", None)


def forget_sparse(metrics: dict[str, Any], scores: dict[str, Any]) -> None:
    """Remove what was measured of a pruned model that is pruned again, and the other evaluations, which were of it too.

    Args:
        metrics: of the record.
        scores: by the digest of an evaluation.
    """
    metrics.pop(_OTHERS, None)
    for key in ("perplexity", "zero_shot", "tasks"):
        for measured in (metrics, *scores.values()):
            measured.get(key, {}).pop("sparse", None)


def bring_forward(metrics: dict[str, Any], entry: dict[str, Any]) -> None:
    """Have an evaluation that is finished now change places with the one at the top."""
    top = _taken(metrics)
    metrics[_OTHERS] = [top | {_FINISHED: True}, *(other for other in metrics[_OTHERS] if other is not entry)]
    for key, value in _taken(entry).items():
        metrics[key] = metrics.get(key, {}) | value if key in _SHARED else value


def counted_tasks(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """The tasks of a zero-shot result that a mean is taken over.

    An lm-eval group counts its subtasks itself and has no items of its own; some tasks have no accuracy.
    """
    return [name for name, values in tasks.items() if values["n"] and values["acc"] is not None]


def task_label(task: str, values: Mapping[str, Any], metric: str) -> str:
    """What a metric of a task is called: `gsm8k exact_match strict-match (5 shots)`; a filter where there are several."""
    name, _, how = metric.partition(",")
    several = sum(other.partition(",")[0] == name for other in values["metrics"]) > 1
    shots = (
        "" if values["num_fewshot"] is None else f" ({values['num_fewshot']} shot{'' if values['num_fewshot'] == 1 else 's'})"
    )
    return f"{task} {name}{f' {how}' if several else ''}{shots}"


def is_share(metric: str) -> bool:
    """Whether a metric of lm-eval is a share of the items, so that it is shown in per cent."""
    return metric.partition(",")[0] in ("acc", "acc_norm", "exact_match", "em", "f1", "pass@1")


def mean_accuracy(tasks: dict[str, dict[str, Any]]) -> float:
    """Over the counted tasks of a zero-shot result; not a number where there is none."""
    counted = counted_tasks(tasks)
    return statistics.fmean(tasks[name]["acc"] for name in counted) if counted else math.nan


def mean_error(tasks: dict[str, dict[str, Any]]) -> float | None:
    """Standard error of `mean_accuracy`, the tasks being independent; None where that of one is not known."""
    errors = [tasks[name]["stderr"] for name in counted_tasks(tasks)]
    return None if None in errors or not errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _taken(values: dict[str, Any]) -> dict[str, Any]:
    """What is an evaluation's, taken out of what else stands there."""
    taken = {key: values.pop(key) for key in _OWN if key in values}
    for key, part in _SHARED.items():
        if part in values.get(key, {}):
            taken[key] = {part: values[key][part]}
            values[key] = {other: value for other, value in values[key].items() if other != part}
    return taken
