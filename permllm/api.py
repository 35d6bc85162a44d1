"""Prune a model that is in memory, measure it, and write it, from Python: what `permllm` itself offers."""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import permllm.export  # noqa: F401 - makes its classes known to transformers
from permllm.config import NMPattern, PerplexityConfig, RunConfig, read_config
from permllm.data.texts import NamedText, Text, perplexity_texts
from permllm.data.windows import calibration_tokens, windows_of
from permllm.errors import ConfigError, DataError, check_whole, first_line
from permllm.evaluation.perplexity import perplexity as measure
from permllm.evaluation.perplexity import perplexity_windows
from permllm.export.checkpoint import Request, write_checkpoint
from permllm.models.checkpoint import read_weights
from permllm.models.families import ChannelGroup, is_plain_linear
from permllm.models.limits import check_windows
from permllm.models.load import LoadedModel
from permllm.models.source import DenseSource, skeleton_like
from permllm.pruning.composition import composed, conf_directory, options_of
from permllm.pruning.methods import Job, checked_groups, methods_of
from permllm.pruning.stages import prune_model
from permllm.runs.directory import Record
from permllm.runs.environment import environment
from permllm.runs.loggers import NO_LOGGER
from permllm.runtime.memory import keep_freed_memory, reset_peak_memory
from permllm.runtime.precision import compute_dtype, half_products
from permllm.runtime.seeding import seed_everything

# Of a model that `prune` has pruned: what `save` needs.
_PRUNED = "_permllm_pruned"
_OWN_TEXT = "text"
# What says how windows are made of documents.
_OF_DOCUMENTS = {f"calibration__{name}" for name in ("samples", "seqlen", "sampling", "data_files")}
# Groups and settings that say what the command is given here as a model and texts, or what it does
# beyond pruning them.
_NOT_HERE = {"model", "evaluation", "export", "logger", "paths", "protocol", "method", "experiment"}
_NOT_HERE |= {"name", "runs_dir", "run_dir", "force", "plan", "save_weights"}
# But what says how the texts are read.
_HERE = {"model.bos"}


class Pruned(NamedTuple):
    """What `prune` found.

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
    texts: str | Sequence[str] | Tensor,
    pruner: str = "wanda",
    permutation: str = "lcp",
    sparsity: str = "2:4",
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
        pruner: an option of that group.
        permutation: an option of that group.
        sparsity: N:M.
        searchpath: where options of other packages lie, as in `hydra.searchpath`:
            `["pkg://mypackage.conf"]`.
        settings: any other, as the command line has it, with two underscores for a dot:
            `permutation__epochs=2`, `calibration__seqlen=512`, `block_size=128`,
            `reconstruction="obs"`, `seed=1`; `model__bos=True` for Gemma.

    Raises:
        ConfigError: a setting is unknown or has a value that cannot work; the model is of no known
            family.
        DataError: the text cannot be had or is too short.
        TrainingError: learning cannot go on.
    """
    _check_model(model, tokenizer, texts)
    texts = _checked(texts, model)
    named = texts if isinstance(texts, str) else _OWN_TEXT
    if isinstance(texts, Tensor) and (
        unheard := [name for name in settings if name in _OF_DOCUMENTS]
    ):
        raise ConfigError(f"{unheard[0]}: texts are windows of tokens, and are taken as they are")
    config = _of_model(
        _composed(pruner, permutation, sparsity, named, settings, searchpath), model, texts
    )
    methods = methods_of(config)
    groups = checked_groups(config, methods, model)
    _check_pruned_before(model, groups)
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
        seed_everything(config.seed, config.deterministic)
        reset_peak_memory(device)
        products = compute_dtype(config.compute_dtype, model.dtype, device)
        # Nothing asks for the tokenizer where texts are tokens.
        loaded = LoadedModel(model, cast(PreTrainedTokenizerBase, tokenizer), "")
        job = Job(config, methods, record, NO_LOGGER, loaded, groups, products)
        setattr(model, _PRUNED, None)  # of an earlier call: an error may leave layers of this one
        pruned = prune_model(job, lambda: _tokens(texts, tokenizer, config, model))
    report = {"name": config.name, "config_hash": config.hash} | record.metrics
    report["history"] = record.history
    found = Pruned(pruned.orders, pruned.masks, report)
    setattr(
        model,
        _PRUNED,
        _InMemory(
            found, tokenizer, config.resolved, environment(config.seed, device), config.pattern
        ),
    )
    return found


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: str | Sequence[str] | Tensor,
    *,
    window: int | None = None,
    limit: int | None = None,
    bos: bool = False,
    batch_tokens: int = 4096,
) -> float:
    """Perplexity over windows that do not overlap, of a model in memory, dense or pruned, as a run measures it.

    Args:
        model: a decoder with its head.
        tokenizer: its tokenizer; None where `texts` are tokens.
        texts: documents, which are joined by a blank line, the name of a text that perplexity is
            measured on (`"wikitext2"`), or windows of tokens, int64 `(windows, window)`.
        window: tokens in each; what is left over is dropped. None is 2,048, or that of `texts` that
            are tokens.
        limit: windows at most; None is all.
        bos: the tokenizer's BOS is the first token of each, as Gemma needs it.
        batch_tokens: tokens a forward.

    Raises:
        ConfigError: there is no such text, or no model; it is none that can be pruned. DataError:
            the text cannot be had, is shorter than a window, or has tokens that the model does not
            know.
    """
    _check_model(model, tokenizer, texts)
    if window is None:
        window = texts.shape[-1] if isinstance(texts, Tensor) else 2048
    check_whole("window", window, 2)
    if limit is not None:
        check_whole("limit", limit, 1)
    check_whole("batch_tokens", batch_tokens, 1)
    if isinstance(texts, Tensor):
        windows = _checked(texts, model)
        assert isinstance(windows, Tensor)
        if windows.shape[1] != window:
            raise ConfigError(
                f"window={window}: texts are windows of {windows.shape[1]} tokens, and are taken as they are"
            )
        windows = windows[:limit]
    else:
        assert tokenizer is not None
        config = PerplexityConfig(
            texts if isinstance(texts, str) else None,
            window,
            limit=limit,
            batch_tokens=batch_tokens,
        )
        windows = perplexity_windows(tokenizer, _to_measure(texts, config), config, bos)
    check_windows("texts", windows, model)
    with _as_loaded(model), half_products(model.dtype, model.device):
        return float(measure(model, windows, batch_tokens)["value"])


def _to_measure(texts: str | Sequence[str], config: PerplexityConfig) -> NamedText:
    if not isinstance(texts, str):
        return NamedText(
            "texts",
            _Documents(_documents(texts, "or the name of a text that perplexity is measured on")),
            kept=False,
        )
    if " " in texts:  # a document, which no message is to repeat
        name = textwrap.shorten(texts, 40)
        raise ConfigError(f"texts={name!r}: expected a list of documents, or the name of a text")
    return perplexity_texts(config)[0]


class _Documents(Text):
    evaluates = True

    def __init__(self, documents: Sequence[str]) -> None:
        self._documents = list(documents)

    def evaluation(self) -> str:
        return "\n\n".join(self._documents)


def save(
    model: PreTrainedModel,
    folder: str | Path,
    form: str = "folded",
    dtype: str | None = None,
    shard_gb: float = 5.0,
) -> dict[str, Any]:
    """Write a model that `prune` has pruned as a checkpoint, as `permllm export` does.

    Args:
        model: whose weights are written as they are now, zeros where the masks say so.
        folder: must not hold anything yet. It appears when it is complete.
        form: `folded` (stock transformers, N:M as it is stored; needs
            `permutation__constraint="foldable"`), `gathered` (any order; `permllm.load` opens it)
            or `simulate` (the original order).
        dtype: of the weights; None is the model's.
        shard_gb: largest size of a file, in 10^9 bytes.

    Returns:
        The summary that is written beside the model: form, pattern, size in bytes, seconds.

    Raises:
        ConfigError: `prune` has not pruned this model, its orders do not fold, the folder is not
            empty.
    """
    started = time.perf_counter()
    record = getattr(model, _PRUNED, None)
    if not isinstance(record, _InMemory):
        raise ConfigError(
            "permllm.save writes a model that permllm.prune has pruned, and this one is not"
        )
    request = Request(form, dtype, shard_gb)
    request.check()
    # It may have been trained in another format since, in a part of it too.
    formats = sorted({parameter.dtype for parameter in model.parameters()}, key=str)
    if len(formats) > 1 and dtype is None:
        names = " and ".join(str(one).removeprefix("torch.") for one in formats)
        raise ConfigError(
            f"the model's weights are in {names}: `dtype` says which of them is written"
        )
    widest = reduce(torch.promote_types, formats)
    of_model = record.config["model"] | {"dtype": str(widest).removeprefix("torch.")}
    record = replace(record, config=record.config | {"model": of_model})
    return write_checkpoint(
        record, request, _source(model, record.tokenizer), Path(folder), started
    )


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """A checkpoint in any of the forms of an export, in evaluation mode.

    Args:
        folder: of the checkpoint.
        options: for `AutoModelForCausalLM.from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        DataError: it is not whole; the tensor is named.
    """
    if "output_loading_info" in options:
        raise ConfigError(
            "output_loading_info: permllm.load answers with the model alone, whose weights it has checked"
        )
    return read_weights(
        Path(folder), options.pop("dtype", None), torch.device("cpu"), **options
    ).eval()


@dataclass(frozen=True)
class _InMemory:
    """What an export needs of a model that was pruned in memory (`permllm.export.checkpoint.PrunedRecord`)."""

    found: Pruned
    tokenizer: PreTrainedTokenizerBase | None
    config: dict[str, Any]
    environment: dict[str, Any]
    pattern: NMPattern

    @property
    def metrics(self) -> dict[str, Any]:
        return self.found.report

    @property
    def orders(self) -> dict[str, Tensor]:
        return self.found.orders

    def pruned(self, groups: list[ChannelGroup]) -> _InMemory:
        return self

    def weight(self, path: str, dense: Tensor) -> Tensor:
        return torch.where(self.found.masks[path].to(dense.device), dense, 0.0)


def _check_model(model: object, tokenizer: object, texts: object) -> None:
    """Raise ConfigError where the model is none with a head, or its tokenizer is missing where it is needed."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        kind = type(model).__name__
        raise ConfigError(
            f"model: expected one that AutoModelForCausalLM gave, with its head, and it is a {kind}"
        )
    if tokenizer is None and not isinstance(texts, Tensor):
        raise ConfigError("tokenizer: only texts that are tokens need none")
    if isinstance(tokenizer, str | Path):
        raise ConfigError(
            f"tokenizer: expected one that AutoTokenizer gave, and it is a {type(tokenizer).__name__}"
        )
    head = model.get_output_embeddings()
    if not is_plain_linear(head):
        raise ConfigError(
            f"model: its head is a {type(head).__name__} that is no plain Linear: adapted models cannot be pruned"
        )


def _check_pruned_before(model: PreTrainedModel, groups: Sequence[ChannelGroup]) -> None:
    """Raise ConfigError where an earlier call has pruned what this one keeps dense: neither knows of all masks and orders."""
    earlier = getattr(model, _PRUNED, None)
    if isinstance(earlier, _InMemory):
        left = sorted(
            earlier.found.masks.keys() - {path for group in groups for path in group.members}
        )
        if left:
            raise ConfigError(
                f"model: an earlier call has pruned {left[0]}, which this one keeps dense: prune a fresh one"
            )


def _checked(
    texts: str | Sequence[str] | Tensor, model: PreTrainedModel
) -> str | Sequence[str] | Tensor:
    """The texts.

    Raises ConfigError where they, or where the model lies, are nothing that can be calibrated with.
    """
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ConfigError(
            f"model: expected its weights in the memory of one device, and they are on {', '.join(places)}"
        )
    if isinstance(texts, Tensor):
        if texts.dim() != 2 or texts.dtype != torch.int64 or not texts.numel():
            raise ConfigError(
                f"texts: expected int64 tokens (samples, seqlen), and it is {texts.dtype} {tuple(texts.shape)}"
            )
        known, least, most = (
            next(model.get_input_embeddings().parameters()).shape[0],
            int(texts.min()),
            int(texts.max()),
        )
        if least < 0 or most >= known:
            raise ConfigError(
                f"texts: expected tokens from 0 to {known - 1}, and there are {least} to {most}"
            )
        return texts
    if isinstance(texts, str):
        options = options_of()["calibration"][1]
        if texts not in options:
            told = (
                f"a list of documents, or one of {', '.join(options)}; a file is texts='text' with "
                "calibration__data_files=PATH"
            )
            raise ConfigError(f"texts={textwrap.shorten(texts, 40)!r}: expected {told}")
        return texts
    return _documents(texts, "or the name of an option of calibration")


def _documents(texts: object, other: str) -> list[str]:
    documents = (
        list(texts) if isinstance(texts, Iterable) and not isinstance(texts, Mapping) else []
    )
    if not documents or not all(isinstance(document, str) for document in documents):
        raise ConfigError(f"texts: expected at least one document, a str each, tokens, {other}")
    return documents


def _composed(
    pruner: str,
    permutation: str,
    sparsity: str,
    text: str,
    settings: dict[str, Any],
    searchpath: Sequence[str],
) -> RunConfig:
    """The settings, as the command line would have composed them."""
    chosen = {"pruner": pruner, "permutation": permutation, "calibration": text, "logger": "none"}
    single = {"sparsity": sparsity}
    for name, value in settings.items():
        key = name.replace("__", ".")
        if isinstance(value, np.generic):
            value = value.item()
        if key.split(".")[0] in _NOT_HERE and key not in _HERE:
            raise ConfigError(
                f"{key}={value}: permllm.prune takes only settings of how to calibrate, permute and prune"
            )
        group = (conf_directory() / key).is_dir()
        (chosen if group else single)[key] = value
    before = (
        GlobalHydra.instance().hydra
    )  # of an application of somebody else's, which goes on with it
    GlobalHydra.instance().clear()
    paths = [f"hydra.searchpath=[{','.join(searchpath)}]"] if searchpath else []
    words = [*paths, "model=tiny", *(f"{group}={name}" for group, name in chosen.items())]
    try:
        found = composed(words)
    finally:
        GlobalHydra.instance().hydra = before
    for key, value in single.items():
        try:
            OmegaConf.update(found, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={value}: {first_line(error)}") from error
    return read_config(found)


def _of_model(
    config: RunConfig, model: PreTrainedModel, texts: str | Sequence[str] | Tensor
) -> RunConfig:
    """The settings with the model and the text that are given."""
    path = str(model.config._name_or_path or model.config.model_type)
    dtype: Any = str(model.dtype).removeprefix("torch.")
    of_model = replace(
        config.model,
        name=path.rstrip("/").rsplit("/", 1)[-1],
        source="local",
        path=path,
        dtype=dtype,
        device=str(model.device),
        architecture={},
    )
    calibration = config.calibration
    if isinstance(texts, Tensor):
        calibration = replace(calibration, samples=texts.shape[0], seqlen=texts.shape[1])
        further = replace(config, calibration=calibration).further
        if further:
            raise ConfigError(
                f"texts has {texts.shape[0]} windows of tokens, and {texts.shape[0] + further} are asked for: `samples` of "
                "the permutation, the mask and the reconstruction, and its `skip`, say how many are learned from"
            )
    mask = "" if config.mask["name"] == "pruner" else f"-{config.mask['name']}"
    methods = f"{config.pruner['name']}-{config.permutation['name']}{mask}"
    name = f"{of_model.name}-{methods}-{config.sparsity.replace(':', 'x')}"
    return replace(config, model=of_model, calibration=calibration, name=name)


def _tokens(
    texts: str | Sequence[str] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RunConfig,
    model: PreTrainedModel,
) -> Tensor:
    if isinstance(texts, Tensor):
        found = texts.cpu().clone()  # which may have been made where gradients are off for good
    else:
        assert tokenizer is not None
        how = config.calibration, config.seed, config.model.bos, config.further
        named = isinstance(texts, str)
        found = calibration_tokens(tokenizer, *how) if named else windows_of(tokenizer, texts, *how)
    check_windows("texts", found, model)
    return found


def _source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> DenseSource:
    state = model.state_dict()

    def read(name: str) -> Tensor:
        if state[name].is_meta:
            raise DataError(f"{name} is not in memory: permllm.save writes a model that is")
        return state[name].detach().cpu()

    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    save_tokenizer = (lambda folder: None) if tokenizer is None else tokenizer.save_pretrained
    return DenseSource(skeleton_like(model), save_tokenizer, generation, "", read)


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, no parameter requiring a gradient or having one, and as it was afterwards."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
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
    """Whoever calls draws the random numbers afterwards that he would have drawn, on every device."""
    python, numbers = random.getstate(), np.random.get_state()
    gpus = (
        range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    )  # a seed is one of all of them
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
