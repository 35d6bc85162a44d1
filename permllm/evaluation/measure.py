"""Evaluation of a model by a list of measures, each with a key that determines its result."""

from collections.abc import Callable, Mapping
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
from permllm.settings.config import EvaluationConfig, LMEvalConfig, TaskConfig
from permllm.settings.identity import digest_of
from permllm.store.cache import cached, tensor_digest
from permllm.store.directory import RunDirectory
from permllm.store.files import EVALUATIONS, read_json

# Values by the name of a text or a task; `scores` are the values of single windows or items.
Results = dict[str, dict[str, Any]]
# Function that measures a model.
Run = Callable[[], Results]


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
    perplexity = settings.perplexity
    rounding = f"/{settings.weights}" if settings.weights else ""
    with fp8_products(loaded.model) if settings.weights else nullcontext():
        for name, of_text in windows.items():
            run = partial(_perplexity, loaded, name, of_text, perplexity.batch_tokens, which)
            digest = tensor_digest(of_text)[:16]
            key = f"perplexity/{name}/{of_text.shape[1]}/{digest}{rounding}"
            _add(record, loaded, "perplexity", key, which, run)
        for name, config in settings.tasks.items():
            run = partial(_task, loaded, name, config, settings.lm_eval)
            file_name = Path(name).name
            digest = digest_of(record.evaluation["evaluation"]["tasks"][file_name])
            _add(record, loaded, "tasks", f"tasks/{file_name}/{digest}{rounding}", which, run)


def _perplexity(
    loaded: LoadedModel, name: str, windows: Tensor, batch_tokens: int, which: str
) -> Results:
    return {name: measure_perplexity(loaded.model, windows, batch_tokens, f"{which} perplexity")}


def _task(loaded: LoadedModel, name: str, config: TaskConfig, shared: LMEvalConfig) -> Results:
    results = run_task(loaded.model, loaded.tokenizer, name, config, shared)
    return {task: values | {"asked": Path(name).name} for task, values in results.items()}


def _add(
    record: RunDirectory, loaded: LoadedModel, kind: str, key: str, which: str, run: Run
) -> None:
    """Add results of a kind to an evaluation that lacks them.

    The key determines the results together with the model.
    """
    evaluation = record.evaluation
    measured = _part(evaluation, "measured", which)
    if key in measured:
        return
    results = parallel.on_main(lambda: _results_of_others(record, kind, key, which))
    if not results and which == "dense":
        key_of_cache = {
            "model": loaded.identity,
            "dtype": str(loaded.model.dtype),
            # Results of a GPU and of a CPU differ by rounding.
            "device": loaded.model.device.type,
            "measure": key,
        }
        results = cached(kind, key_of_cache, run)
    elif not results:
        results = parallel.broadcast(run())
    for name, values in results.items():
        scores = values.pop("scores", None)
        if scores:
            _part(evaluation, "scores", kind, which)[name] = scores
        _part(evaluation, kind, which)[name] = values
    measured[key] = list(results)
    record.save()


def _results_of_others(record: RunDirectory, kind: str, key: str, which: str) -> Results:
    """Return results of the run's other evaluations under a key; empty: there are none."""
    results = {}
    for file in sorted((record.directory / EVALUATIONS).glob("*.json")):
        other = read_json(file)
        for name in _part(other, "measured", which).get(key, []):
            scores = _part(other, "scores", kind, which).get(name)
            results[name] = other[kind][which][name] | {"scores": scores}
    return results


def _part(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a mapping inside nested ones, and create those that are missing."""
    for key in keys:
        values = values.setdefault(key, {})
    return values
