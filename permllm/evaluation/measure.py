"""Evaluation of a model by a list of measures, each with a key that determines its result."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from permllm.evaluation.fp8 import fp8_products
from permllm.evaluation.lm_eval import run_task
from permllm.evaluation.perplexity import measure_perplexity
from permllm.models.load import LoadedModel
from permllm.runtime import parallel
from permllm.settings.config import EvaluationConfig
from permllm.settings.identity import digest_of
from permllm.store.cache import cached, tensor_digest
from permllm.store.directory import RunDirectory
from permllm.store.files import EVALUATIONS, read_json

# Values by the name of a text or a task; `scores` are the values of single windows or items.
Results = dict[str, dict[str, Any]]
# Function that measures a model; its argument, `dense` or `sparse`, labels the progress bar.
Run = Callable[[str], Results]


def evaluate(
    loaded: LoadedModel,
    settings: EvaluationConfig,
    windows: Mapping[str, Tensor],
    which: str,
    record: RunDirectory,
) -> None:
    """Compute the measures that a run's evaluation lacks, and save it after each of them.

    A result under the same key is copied from another evaluation of the run. Runs share results of
    the dense model by the cache.

    Args:
        loaded: the dense or pruned model; its identity is the dense model's.
        settings: settings of the evaluation.
        windows: windows of each text for perplexity, by its name.
        which: `dense` or `sparse`.
        record: record of the run.
    """
    evaluation = record.evaluation
    folder = record.directory / EVALUATIONS
    others = parallel.on_main(lambda: [read_json(file) for file in sorted(folder.glob("*.json"))])
    with fp8_products(loaded.model) if settings.weights else nullcontext():
        for kind, key, run in _measures(loaded, settings, windows, evaluation):
            measured = _part(evaluation, "measured", which)
            if key in measured:
                continue
            results = _results_of_others(others, kind, key, which)
            if not results:
                results = _measured(loaded, kind, key, run, which)
            for name, values in results.items():
                scores = values.pop("scores", None)
                if scores:
                    _part(evaluation, "scores", kind, which)[name] = scores
                _part(evaluation, kind, which)[name] = values
            measured[key] = list(results)
            record.save()


def _measures(
    loaded: LoadedModel,
    settings: EvaluationConfig,
    windows: Mapping[str, Tensor],
    evaluation: dict[str, Any],
) -> Iterator[tuple[str, str, Run]]:
    """Yield the perplexity on each text, and each task.

    Each has a kind (`perplexity` or `tasks`, the key of its results in an evaluation), a text that
    determines the result together with the model, and its function.
    """
    rounding = f"/{settings.weights}" if settings.weights else ""
    for name, of_text in windows.items():
        key = f"perplexity/{name}/{of_text.shape[1]}/{tensor_digest(of_text)[:16]}{rounding}"
        yield "perplexity", key, partial(_perplexity, loaded, settings, name, of_text)
    for name in settings.tasks:
        file_name = Path(name).name
        digest = digest_of(evaluation["evaluation"]["tasks"][file_name])
        key = f"tasks/{file_name}/{digest}{rounding}"
        yield "tasks", key, partial(_task, loaded, settings, name)


def _perplexity(
    loaded: LoadedModel, settings: EvaluationConfig, name: str, windows: Tensor, which: str
) -> Results:
    tokens = settings.perplexity.batch_tokens
    return {name: measure_perplexity(loaded.model, windows, tokens, f"{which} perplexity")}


def _task(loaded: LoadedModel, settings: EvaluationConfig, name: str, which: str) -> Results:
    config = settings.tasks[name]
    results = run_task(loaded.model, loaded.tokenizer, name, config, settings.lm_eval)
    return {task: values | {"asked": Path(name).name} for task, values in results.items()}


def _measured(loaded: LoadedModel, kind: str, key: str, run: Run, which: str) -> Results:
    if which != "dense":
        return parallel.broadcast(run(which))
    key_of_cache = {
        "model": loaded.identity,
        "dtype": str(loaded.model.dtype),
        # Results of a GPU and of a CPU differ by rounding.
        "device": loaded.model.device.type,
        "measure": key,
    }
    return cached(kind, key_of_cache, lambda: run(which))


def _results_of_others(others: list[dict[str, Any]], kind: str, key: str, which: str) -> Results:
    """Return results of other evaluations under a key; empty: there are none."""
    results = {}
    for other in others:
        for name in _part(other, "measured", which).get(key, []):
            scores = _part(other, "scores", kind, which).get(name)
            results[name] = other[kind][which][name] | {"scores": scores}
    return results


def _part(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a mapping inside nested ones, and create those that are missing."""
    for key in keys:
        values = values.setdefault(key, {})
    return values
