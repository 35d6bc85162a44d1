"""Functions of `permllm` itself: prune a model in memory, measure it, write it, and read runs."""

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import permllm.export  # noqa: F401 - lets transformers load gathered checkpoints
from permllm.data.lookup import PERPLEXITY, calibration_text, text_named
from permllm.data.texts import Documents
from permllm.errors import ConfigError
from permllm.evaluation.perplexity import measure_perplexity, perplexity_windows
from permllm.export.keep_zeros import keep_zeros  # noqa: F401 - part of `permllm`
from permllm.export.write import PrunedSource, write_checkpoint
from permllm.job import job_windows, prune_model
from permllm.models.checkpoint import read_weights, skeleton_like
from permllm.models.load import LoadedModel, check_layers, check_windows, dense_folder
from permllm.models.source import DenseSource
from permllm.pruning.checks import warn_if_pruned
from permllm.pruning.methods import Job, checked_groups, methods_of
from permllm.report.read import collect
from permllm.report.table import by_run, table_of
from permllm.runtime.devices import seed_everything
from permllm.runtime.memory import keep_freed_memory, reset_peak_memory
from permllm.runtime.precision import compute_dtype, working_dtype
from permllm.settings.composition import check_amounts, composed
from permllm.settings.config import ExportConfig, PerplexityConfig, RunConfig, read_config
from permllm.settings.options import options as options_of
from permllm.settings.values import validated
from permllm.store.directory import Record
from permllm.store.loggers import NO_LOGGER

log = logging.getLogger(__name__)

Texts = str | Sequence[str] | Tensor

# Attribute by which `prune` leaves on a model the values that `save` needs.
_PRUNED = "_permllm_pruned"
# Groups and settings of the command that do not concern pruning.
_NOT_HERE = {
    *("evaluation", "export", "logger", "experiment", "save_weights", "model.placement"),
    *("name", "runs_dir", "run_dir", "force", "plan", "plan_on"),
}


class Pruned(NamedTuple):
    """Result of `prune`.

    Attributes:
        permutations: by channel group, int64 `(C_in,)`: `weight[:, permutation]` is N:M.
        masks: masks by the path of a linear, bool `(C_out, C_in)`, original channel order, on the
            CPU; True: the weight is kept.
        report: plain values, named as in `metrics.json`: sparsity and violations, saliency retained
            and output error by channel group, seconds of each phase, peak memory, and `history`
            with one entry for each epoch of learning.
    """

    permutations: dict[str, Tensor]
    masks: Mapping[str, Tensor]
    report: dict[str, Any]


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    texts: Texts,
    searchpath: Sequence[str] = (),
    **settings: Any,
) -> Pruned:
    """Prune a model in place, as `permllm run` does.

    Args:
        model: decoder with its head, on one device, with its weights in memory. Afterwards its
            linears hold `weight * mask` or the updated weight, in the original channel order.
        tokenizer: tokenizer of the model; None is valid if `texts` are tokens.
        texts: text to calibrate on: documents, the name of an option of the group `calibration`
            (`"c4"`), or windows of tokens, int64 `(windows, seqlen)`, taken without another BOS.
            With `calibration__samples=N` the first N windows calibrate, and methods whose own
            `samples` ask for more learn from those after them.
        searchpath: places with options of other packages: `["pkg://mypackage.conf"]`.
        settings: settings of the command line, with two underscores for a dot: `method="masks"`,
            `sparsity="2:4"`, `permutation__epochs=2`; `model__bos=True` for Gemma.

    Raises:
        ConfigError: a setting is unknown or cannot work, or the model cannot be pruned.
        DataError: the text is not available or too short.
        TrainingError: learning cannot continue.
    """
    _check(model, tokenizer, texts)
    config = _config(model, texts, searchpath, settings)
    methods = methods_of(config)
    groups = checked_groups(config, methods, model)
    # Nothing asks for the tokenizer if texts are tokens.
    loaded = LoadedModel(model, tokenizer, "", config.model.bos)  # type: ignore[arg-type]
    record = Record()
    if model.device.type == "cpu":
        keep_freed_memory()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),  # the caller may have switched gradients off
        _as_loaded(model),
        _global_state_kept(),
    ):
        check_layers("model", model)
        seed_everything(config.seed, config.deterministic)
        reset_peak_memory(model.device)
        products = compute_dtype(config.compute_dtype, model.dtype, model.device)
        record.set_compute_dtype(products)
        warn_if_pruned(model, groups.pruned, config.pattern)
        job = Job(config, methods, record, NO_LOGGER, loaded, groups, products)
        job.windows = _windows(texts, job)
        # After an error some layers may be pruned and others not, which `save` must not write.
        setattr(model, _PRUNED, None)
        pruned = prune_model(job)
    named = {"name": config.name, "config_hash": config.hash}
    report = named | record.metrics | {"history": record.history}
    result = Pruned(pruned.permutations, pruned.masks, report)
    setattr(model, _PRUNED, (result, tokenizer, config.resolved))
    return result


def _windows(texts: Texts, job: Job) -> Tensor:
    """Return the windows to calibrate on and then those for learning, int64 `(windows, seqlen)`."""
    settings = job.config.calibration
    if not isinstance(texts, Tensor):
        text = calibration_text(settings) if isinstance(texts, str) else Documents(texts)
        return job_windows(job, text, "texts")
    extra = job.methods.extra_windows(settings.samples)
    needed = settings.samples + extra
    if len(texts) < needed:
        raise ConfigError(
            f"texts: got {len(texts)} windows of tokens, expected {needed}: "
            f"{settings.samples} to calibrate on, and {extra} to learn from"
        )
    windows = texts[:needed].cpu().clone()  # a tensor of inference mode has no gradients
    check_windows("texts", windows, job.loaded.model)
    return windows


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Texts,
    *,
    seqlen: int = 2048,
    limit: int | None = None,
    batch_tokens: int = 2048,
    bos: bool = False,
) -> float:
    """Measure the perplexity of a model in memory, as a run does, over windows without overlap.

    Args:
        model: decoder with its head, dense or pruned.
        tokenizer: tokenizer of the model; None is valid if `texts` are tokens.
        texts: documents, which are joined by a blank line; the name of a text for perplexity
            (`"wikitext2"`); or windows of tokens, int64 `(windows, seqlen)`, taken as they are.
        seqlen: tokens in a window.
        limit: number of windows that are measured; None: all.
        batch_tokens: tokens in a forward, at least one window.
        bos: True: the first token of each window is the tokenizer's BOS, as Gemma needs it.

    Raises:
        ConfigError: the name is no text for perplexity, or the model is no decoder.
        DataError: the text is not available, too short, or has tokens that the model lacks.
    """
    _check(model, tokenizer, texts)
    dataset = texts if isinstance(texts, str) else None
    settings = {"dataset": dataset, "seqlen": seqlen, "limit": limit, "batch_tokens": batch_tokens}
    config = validated(PerplexityConfig, settings)
    if isinstance(texts, Tensor):
        windows = texts[:limit]
        check_windows("texts", windows, model)
    else:
        text = Documents(texts) if dataset is None else text_named(PERPLEXITY, dataset, "evaluates")
        loaded = LoadedModel(model, tokenizer, "", bos)  # type: ignore[arg-type]
        windows = perplexity_windows(loaded, text, config, "texts")
    with _as_loaded(model):
        return float(measure_perplexity(model, windows, batch_tokens)["value"])


def save(
    model: PreTrainedModel,
    folder: str | Path,
    form: str | None = None,
    dtype: str | None = None,
    shard_gb: float = ExportConfig.shard_gb,
    serve: str | None = None,
) -> dict[str, Any]:
    """Write a pruned model as a checkpoint, as `permllm export` does.

    Args:
        model: model that `prune` has pruned. Its present weights are written, with its masks.
        folder: new or empty folder. It appears when it is complete.
        form: `folded` (for stock transformers; needs `permutation__constraint="foldable"`),
            `gathered` (any permutation; `permllm.load` opens it) or `simulate` (original channel
            order). None: the first that the permutations allow.
        dtype: dtype of the weights; None: that of the model.
        shard_gb: largest size of a file, in 10^9 bytes.
        serve: `vllm` also writes vLLM's settings for FP8 and 2:4; None: no such settings.

    Returns the summary that is written beside the model: form, pattern, size in bytes, seconds.

    Raises:
        ConfigError: `prune` has not pruned this model, its permutations do not fold, the folder is
            not empty, or the weights have several dtypes and `dtype` is None.
        DataError: weights are not finite.
    """
    if getattr(model, _PRUNED, None) is None:
        raise ConfigError("model: permllm.save expects a model that permllm.prune has pruned")
    dtypes = {parameter.dtype for parameter in model.parameters()}  # after training, several
    if len(dtypes) > 1 and dtype is None:
        raise ConfigError(f"dtype: the model's weights are in {sorted(map(str, dtypes))}; name one")
    result, tokenizer, config = getattr(model, _PRUNED)
    dtype = dtype or _dtype(model)
    settings = {"form": form or "none", "dtype": dtype, "shard_gb": shard_gb, "serve": serve}
    state = model.state_dict()

    def weight(path: str, dense: Tensor) -> Tensor:
        return torch.where(result.masks[path], dense, 0.0)

    source = DenseSource(
        skeleton_like(model),
        tokenizer.save_pretrained if tokenizer is not None else lambda target: None,
        "",
        lambda name: state[name].detach().cpu(),
    )
    pruned = PrunedSource(source, config, result.report, result.permutations, weight)
    return write_checkpoint(pruned, validated(ExportConfig, settings, "export"), Path(folder))


def load(
    place: str | Path,
    *,
    accept_terms: bool = False,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a dense model by its name, or a checkpoint in any form of an export, for evaluation.

    The tokenizer is `AutoTokenizer.from_pretrained(model.name_or_path)`.

    Args:
        place: folder of the checkpoint, or an option of the group `model` (`"smollm2-135m"`), whose
            files are downloaded.
        accept_terms: as `model.accept_terms`, for a model that is downloaded.
        dtype: dtype of the weights, or its name; None: that of the files.
        options: further arguments of `AutoModelForCausalLM.from_pretrained`, such as `device_map`.

    Raises:
        ConfigError: terms are not accepted.
        DataError: the model cannot be downloaded, or the checkpoint is damaged.
    """
    folder = Path(place)
    if not folder.is_dir() and str(place) in options_of("model"):
        words = [f"model={place}", f"model.accept_terms={accept_terms}"]
        folder = dense_folder(read_config(_composed_outside_hydra(words)).model) or folder
    return read_weights(folder, dtype, torch.device("cpu"), **options).eval()


def results(*places: str | Path) -> pd.DataFrame:
    """Return a row for each finished run: its settings, metrics, minutes and folder.

    The places are run directories, folders with run directories, or files of records.
    Raises ConfigError if a place does not exist, or none holds a finished run.
    """
    return by_run(table_of(collect(map(Path, places)).runs))


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check(model: PreTrainedModel, tokenizer: object, texts: Texts) -> None:
    """Raise ConfigError for what `prune` and `perplexity` refuse; warn of a slow dtype."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ConfigError(
            f"model: expected a model of AutoModelForCausalLM, got a {type(model).__name__}"
        )
    if isinstance(texts, Tensor):
        are_windows = texts.dim() == 2 and len(texts) > 0 and texts.shape[1] > 1
        is_valid = texts.dtype == torch.int64 and are_windows and bool(texts.min() >= 0)
    else:
        is_sequence = isinstance(texts, Sequence) and len(texts) > 0
        is_valid = is_sequence and all(isinstance(document, str) for document in texts)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError("tokenizer: expected a tokenizer of AutoTokenizer")
    if not is_valid:
        raise ConfigError(
            "texts: expected a list of documents, the name of a text, or windows of tokens, int64 "
            "(windows, seqlen) with seqlen > 1"
        )
    if working_dtype(model.dtype, model.device) != model.dtype:
        log.warning("model: this CPU is slow in %s; model.float() is faster", _dtype(model))


def _config(
    model: PreTrainedModel, texts: Texts, searchpath: Sequence[str], settings: dict[str, Any]
) -> RunConfig:
    """Return the settings as the command line would, with the model and the text as given."""
    if isinstance(searchpath, str):
        raise ConfigError(f"searchpath={searchpath!r}: expected a list of places")
    path = str(model.config._name_or_path or model.config.model_type)
    values: dict[str, Any] = {
        "model": "local",
        "model.name": Path(path).name,
        "model.source": "random",  # its weights are in memory, and no files are read
        "model.dtype": _dtype(model),
        "model.device": str(model.device),
        "logger": "none",
        "calibration": texts if isinstance(texts, str) else "text",
        "hydra.searchpath": list(searchpath),
    }
    if not isinstance(texts, str):
        values["calibration.data_files"] = None
    if isinstance(texts, Tensor):
        values["calibration.seqlen"] = texts.shape[1]
        settings = {"calibration__samples": len(texts)} | settings
    overrides = {name.replace("__", "."): value for name, value in settings.items()}
    for key in overrides:
        if key in values or not _NOT_HERE.isdisjoint({key, key.split(".")[0]}):
            raise ConfigError(f"{key}: permllm.prune does not use it, or sets it itself")
    words = [
        f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"
        for key, value in (values | overrides).items()
    ]
    composed_settings = _composed_outside_hydra(words)
    config = read_config(composed_settings)
    check_amounts(overrides, composed_settings, config)
    return config


def _composed_outside_hydra(words: Sequence[str]) -> DictConfig:
    """Compose settings as the command line would, beside a Hydra of the caller's application."""
    callers_hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        return composed(words)
    finally:
        GlobalHydra.instance().hydra = callers_hydra


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore its state at the end."""
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(each, each.requires_grad, each.grad) for each in model.parameters()]
    model.eval().requires_grad_(False)
    model.zero_grad()  # learning would add to gradients
    try:
        yield
    finally:
        for module, trains in modules:
            module.training = trains
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """Restore what `seed_everything` sets: all random generators, and deterministic algorithms."""
    python = random.getstate()
    numbers = np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        random.setstate(python)
        np.random.set_state(numbers)
