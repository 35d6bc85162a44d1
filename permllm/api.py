"""Prune a model in memory, measure it, write it, and read runs: what `permllm` itself offers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import permllm.export  # noqa: F401 - lets transformers load gathered checkpoints
from permllm.config import PerplexityConfig, read_config
from permllm.data.texts import NamedText, Text, perplexity_texts
from permllm.data.windows import calibration_tokens, windows_of
from permllm.errors import ConfigError, first_line
from permllm.evaluation.perplexity import perplexity as measure
from permllm.evaluation.perplexity import perplexity_windows
from permllm.export.checkpoint import PrunedModel, Request, write_checkpoint
from permllm.models.checkpoint import read_weights
from permllm.models.families import linear_at
from permllm.models.head import head_path
from permllm.models.limits import check_windows
from permllm.models.load import LoadedModel, check_layers
from permllm.models.source import DenseSource, skeleton_like
from permllm.pruning.composition import composed, conf_directory, replaced_options
from permllm.pruning.methods import Job, checked_groups, methods_of
from permllm.pruning.stages import prune_model
from permllm.runs.directory import Record
from permllm.runs.loggers import NO_LOGGER
from permllm.runs.read import collect
from permllm.runs.table import Table
from permllm.runtime.devices import seed_everything
from permllm.runtime.memory import keep_freed_memory, reset_peak_memory
from permllm.runtime.precision import compute_dtype, half_products
from permllm.runtime.values import refused

Texts = str | Sequence[str] | Tensor

# Attribute of a model that `prune` has pruned: what `save` needs.
_PRUNED = "_permllm_pruned"
# Groups and settings of what the command does beyond pruning.
_NOT_HERE = {"evaluation", "export", "logger", "paths", "experiment", "save_weights"}
_NOT_HERE |= {"name", "runs_dir", "run_dir", "force", "plan", "plan_on"}


class Pruned(NamedTuple):
    """Result of `prune`.

    Attributes:
        orders: int64 `(C_in,)` by channel group: the order in which `weight[:, order]` is N:M.
        masks: bool `(C_out, C_in)` by the path of a linear, original channel order, on the CPU;
            True is kept.
        report: plain values, named as in `metrics.json`: sparsity and violations, saliency retained
            and output error by channel group, seconds of each stage, peak memory, and `history`, a
            line for each epoch of learning.
    """

    orders: dict[str, Tensor]
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
        model: a decoder with its head, on one device, with its weights in memory. Its linears hold
            `weight * mask` afterwards (or the updated weight), in the original channel order.
        tokenizer: its tokenizer; None where `texts` are tokens and no checkpoint is to hold one.
        texts: to calibrate on: documents, the name of an option of the group `calibration`
            (`"c4"`), or windows of tokens, int64 `(samples, seqlen)`.
        searchpath: where options of other packages lie, as in `hydra.searchpath`:
            `["pkg://mypackage.conf"]`.
        settings: as the command line has them, with two underscores for a dot: `method="masks"`,
            `pruner="ria"`, `permutation="lcp"`, `sparsity="2:4"`, `permutation__epochs=2`,
            `calibration__seqlen=512`, `block_size=128`; `model__bos=True` for Gemma.

    Raises:
        ConfigError: a setting is unknown or cannot work; the model is none that can be pruned.
        DataError: the text cannot be had or is too short.
        TrainingError: learning cannot go on.
    """
    _check(model, tokenizer, texts)
    config = read_config(_composed(model, texts, searchpath, settings))
    if isinstance(texts, Tensor) and config.further:
        asked = len(texts) + config.further
        raise ConfigError(f"texts has {len(texts)} windows of tokens, and {asked} are asked for")
    methods = methods_of(config)
    groups = checked_groups(config, methods, model)

    def tokens() -> Tensor:
        if isinstance(texts, Tensor):
            return texts.cpu().clone()  # it may be of inference mode
        assert tokenizer is not None
        how = config.calibration, config.seed, config.model.bos, config.further
        if isinstance(texts, str):
            windows = calibration_tokens(tokenizer, *how)
        else:
            windows = windows_of(tokenizer, texts, *how)
        check_windows("texts", windows, model)
        return windows

    device, record = model.device, Record()
    if device.type == "cpu":
        keep_freed_memory()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),  # which whoever calls may have switched off
        _as_loaded(model),
        _random_numbers_kept(),
        half_products(model.dtype, device),
    ):
        check_layers("model", model)
        seed_everything(config.seed, config.deterministic)
        reset_peak_memory(device)
        products = compute_dtype(config.compute_dtype, model.dtype, device)
        # Nothing asks for the tokenizer where texts are tokens.
        loaded = LoadedModel(model, cast(PreTrainedTokenizerBase, tokenizer), "")
        job = Job(config, methods, record, NO_LOGGER, loaded, groups, products)
        setattr(model, _PRUNED, None)  # of an earlier call: an error may leave layers of this one
        pruned = prune_model(job, tokens)
    report = {"name": config.name, "config_hash": config.hash} | record.metrics
    found = Pruned(pruned.orders, pruned.masks, report | {"history": record.history})
    setattr(model, _PRUNED, (found, tokenizer, config.resolved))
    return found


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
    """Measure perplexity over windows that do not overlap, of a model in memory, as a run does.

    Args:
        model: a decoder with its head, dense or pruned.
        tokenizer: its tokenizer; None where `texts` are tokens.
        texts: documents, which are joined by a blank line, the name of a text that perplexity is
            measured on (`"wikitext2"`), or windows of tokens, int64 `(windows, seqlen)`.
        seqlen, limit, batch_tokens: as in `evaluation.perplexity`; windows of tokens have their own
            length.
        bos: the tokenizer's BOS is the first token of each window, as Gemma needs it.

    Raises:
        ConfigError: there is no such text, or no such model.
        DataError: the text cannot be had, is shorter than a window, or has tokens that the model
            does not know.
    """
    _check(model, tokenizer, texts)
    named = texts if isinstance(texts, str) else None
    given: dict[str, Any] = {"dataset": named, "seqlen": seqlen, "limit": limit}
    given["batch_tokens"] = batch_tokens
    try:
        config = PerplexityConfig(**given)
    except ValidationError as error:
        raise refused(error, given) from error
    if isinstance(texts, Tensor):
        windows = texts[:limit]
    else:
        assert tokenizer is not None
        text = (
            perplexity_texts(config)[0] if named else NamedText("texts", _Documents(texts), False)
        )
        windows = perplexity_windows(tokenizer, text, config, bos)
    check_windows("texts", windows, model)
    with _as_loaded(model), half_products(model.dtype, model.device):
        return float(measure(model, windows, batch_tokens)["value"])


def save(
    model: PreTrainedModel,
    folder: str | Path,
    form: str | None = None,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    serve: str | None = None,
) -> dict[str, Any]:
    """Write a model that `prune` has pruned as a checkpoint, as `permllm export` does.

    Args:
        model: whose weights are written as they are now, zeros where the masks say so.
        folder: must not hold anything yet. It appears when it is complete.
        form: `folded` (transformers loads it, N:M as it is stored; needs
            `permutation__constraint="foldable"`), `gathered` (any order; `permllm.load` opens it)
            or `simulate` (the original order). None is the first that the permutations allow.
        dtype: of the weights; None is the model's.
        shard_gb: largest size of a file, in 10^9 bytes.
        serve: `vllm` writes its settings for FP8 and 2:4 too; None: none.

    Returns:
        The summary that is written beside the model: form, pattern, size in bytes, seconds.

    Raises:
        ConfigError: `prune` has not pruned this model, its orders do not fold, the folder is not
            empty, weights have several dtypes and none is given.
        DataError: weights are not finite.
    """
    if getattr(model, _PRUNED, None) is None:
        raise ConfigError("permllm.save writes a model that permllm.prune has pruned")
    dtypes = {parameter.dtype for parameter in model.parameters()}  # after training, several
    if len(dtypes) > 1 and dtype is None:
        raise ConfigError(f"dtype: the model's weights are in {sorted(map(str, dtypes))}; name one")
    found, tokenizer, config = getattr(model, _PRUNED)
    state = model.state_dict()

    def read(name: str) -> Tensor:
        return state[name].detach().cpu()

    def weight(path: str, dense: Tensor) -> Tensor:
        return torch.where(found.masks[path], dense, 0.0)

    def save_tokenizer(target: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    source = DenseSource(skeleton_like(model), save_tokenizer, generation, "", read)
    present = str(model.dtype).removeprefix("torch.")
    config = config | {"model": config["model"] | {"dtype": present}}
    pruned = PrunedModel(source, config, found.report, found.orders, weight)
    return write_checkpoint(pruned, Request(form, dtype, shard_gb, serve), Path(folder))


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint in any of the forms of an export, in evaluation mode.

    Args:
        folder: of the checkpoint.
        options: for `AutoModelForCausalLM.from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        DataError: it is not whole; the message names file or tensor.
    """
    dtype = options.pop("dtype", None)
    return read_weights(Path(folder), dtype, torch.device("cpu"), **options).eval()


def results(*places: str | Path) -> pd.DataFrame:
    """Return a row for each finished run: its settings, measures, minutes and folder.

    Args:
        places: run directories, folders that hold some, or kept records.

    Raises:
        ConfigError: a place does not exist, or none holds a finished run.
    """
    return Table(collect(map(Path, places)).runs).frame


class _Documents(Text):
    def __init__(self, documents: Sequence[str]) -> None:
        self._documents = documents

    def evaluation(self) -> str:
        return "\n\n".join(self._documents)


def _check(model: PreTrainedModel, tokenizer: object, texts: Texts) -> None:
    """Raise ConfigError where one of them is not what `prune` and `perplexity` take."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        kind = type(model).__name__
        raise ConfigError(f"model: expected one of AutoModelForCausalLM, and it is a {kind}")
    linear_at(model, head_path(model))
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1 or places == {"meta"}:
        raise ConfigError(f"model: its weights must be on one device, and are on {sorted(places)}")
    if isinstance(texts, Tensor):
        if texts.dtype != torch.int64 or texts.dim() != 2 or not texts.numel() or texts.min() < 0:
            raise ConfigError("texts: expected documents, a name, or int64 (samples, seqlen)")
        check_windows("texts", texts, model)
    elif not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError("tokenizer: expected one of AutoTokenizer; only tokens need none")
    elif not texts or not all(isinstance(document, str) for document in texts):
        raise ConfigError("texts: expected at least one document, a str each, or a name")
    elif isinstance(texts, str) and len(texts.split()) > 1:
        raise ConfigError("texts: expected a list of documents, or the name of a text")


def _composed(
    model: PreTrainedModel, texts: Texts, searchpath: Sequence[str], settings: dict[str, Any]
) -> DictConfig:
    """Compose the settings as the command line would, with the model and the text as given."""
    path = str(model.config._name_or_path or model.config.model_type)
    chosen = {"model": "local", "logger": "none"}
    chosen["calibration"] = texts if isinstance(texts, str) else "text"
    given: dict[str, Any] = {"model.name": path.rstrip("/").rsplit("/", 1)[-1], "model.path": path}
    given |= {"model.dtype": str(model.dtype).removeprefix("torch.")}
    given |= {"model.device": str(model.device)}
    if isinstance(texts, Tensor):
        samples, seqlen = texts.shape
        given |= {"calibration.samples": samples, "calibration.seqlen": seqlen}
    asked = {name.replace("__", "."): value for name, value in settings.items()}
    for key in asked:
        if key in given or key in chosen or key.split(".")[0] in _NOT_HERE:
            raise ConfigError(f"{key}: no setting of permllm.prune with this model and these texts")
    groups = {key: asked.pop(key) for key in list(asked) if (conf_directory() / key).is_dir()}
    words = [f"hydra.searchpath=[{','.join(searchpath)}]"] if searchpath else []
    words += [f"{key}={name}" for key, name in (chosen | groups).items()]
    theirs = GlobalHydra.instance().hydra  # of an application that goes on with it
    GlobalHydra.instance().clear()
    try:
        found = composed(words)
    finally:
        GlobalHydra.instance().hydra = theirs
    if replaced_options(groups.get("method", ""), groups):
        found.method = None  # the name would be wrong
    for key, value in (given | asked).items():
        try:
            OmegaConf.update(found, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={value}: {first_line(error)}") from error
    return found


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and back as it was."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    model.eval().requires_grad_(False)
    for parameter, _, _ in gradients:
        parameter.grad = None  # what learns would add to it
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
        for parameter, required, gradient in gradients:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Leave whoever calls the random numbers that he would have drawn, on every device."""
    python, numbers = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
