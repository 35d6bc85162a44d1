"""One job from its settings to its record: load, calibrate, permute, prune, evaluate, export."""

import logging
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.data.hub import hub_snapshot
from permllm.data.texts import HubText, calibration_text, check_texts, perplexity_texts
from permllm.data.windows import calibration_tokens
from permllm.errors import ConfigError, DataError
from permllm.evaluation.lm_eval import check_tasks
from permllm.evaluation.measure import evaluate
from permllm.evaluation.perplexity import perplexity_windows
from permllm.export.rebuild import apply_record
from permllm.export.serve import check_serve, serving
from permllm.export.write import export_run, present_export
from permllm.models.families import channel_groups
from permllm.models.limits import check_windows
from permllm.models.load import LoadedModel, load_model, meta_model
from permllm.models.selection import differing_patterns
from permllm.planning.footprint import Footprint
from permllm.planning.placement import placement_for
from permllm.planning.plan import print_plan
from permllm.pruning.methods import Job, Methods, checked_groups, methods_of
from permllm.pruning.stages import prune_model
from permllm.report.measures import flat_figures
from permllm.report.render import print_run
from permllm.runtime import parallel
from permllm.runtime.devices import resolve_device, seed_everything
from permllm.runtime.memory import (
    SPARING,
    keep_freed_memory,
    reset_peak_memory,
    return_freed_memory,
)
from permllm.runtime.precision import compute_dtype, half_products
from permllm.settings.config import ExportConfig, RunConfig
from permllm.store import sweep
from permllm.store.cache import choose_cache
from permllm.store.directory import RunDirectory, run_directory
from permllm.store.environment import environment
from permllm.store.files import ENVIRONMENT, EXPORT, LOG, write_json
from permllm.store.loggers import NO_LOGGER, RunLogger, job_log, open_logger

log = logging.getLogger(__name__)


def run(config: RunConfig) -> tuple[dict[str, Any], Path] | None:
    """Run one job, under torchrun in all ranks. Rank 0 keeps the record.

    Returns:
        The metrics and the run directory; None after plan=true.

    Raises:
        PermLLMError: an error that the user can fix.
    """
    choose_cache(config.paths.cache_dir)
    check_texts(config.calibration, config.evaluation.perplexity)
    methods = methods_of(config)
    export = export_of(config, methods)
    device = resolve_device(config.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        return_freed_memory()  # memory that an earlier job freed would count as taken
    if config.plan:
        footprint = _footprint(config, methods, torch.device("cuda") if config.plan_on else device)
        if parallel.rank() == 0:
            print_plan(footprint)
        return None

    record = RunDirectory(run_directory(config), config)
    with record.opened(config.force, wait=not sweep.sweeping()):
        if record.finished:
            to = config.logger.name
            unlogged = "" if to in ("auto", "none") else f", and nothing is logged to {to}"
            log.info(
                "%s is finished already%s; force=true runs and logs it again",
                record.directory,
                unlogged,
            )
        else:
            _unfinished(config, methods, record, device)
        if export is not None:
            parallel.on_main(lambda: _export(export, record))
        if parallel.rank() == 0:
            print_run(record.metrics, record.directory)
    return record.metrics, record.directory


def _footprint(config: RunConfig, methods: Methods, device: torch.device) -> Footprint:
    """Return the sizes of a job. Raises ConfigError if a method cannot work on its model."""
    model = meta_model(config.model)
    pruned = checked_groups(config, methods, model)
    if config.export.serve:
        patterns = differing_patterns(channel_groups(model), pruned)
        serving(model, config.sparsity, patterns)
    return Footprint(config, model, methods, device)


def _unfinished(
    config: RunConfig, methods: Methods, record: RunDirectory, device: torch.device
) -> None:
    """Run the stages of a run that are not finished."""
    check_tasks(config.evaluation)
    products = compute_dtype(config.compute_dtype, getattr(torch, config.model.dtype), device)
    if not record.pruned:
        record.keep_products(products)
    footprint = _footprint(config, methods, device)
    _check_shares(config, methods, record)
    parallel.on_main(lambda: _fetch_from_hub(config, record.pruned))
    placement = parallel.share(placement_for(footprint))
    config = replace(config, model=replace(config.model, placement=placement))
    if device.type == "cpu" and placement == "disk":
        keep_freed_memory(SPARING)
    if not record.pruned:
        record.metrics |= {
            "placement": placement,
            "planned_memory_bytes": footprint.needs(placement).peak,
        }
    logger = NO_LOGGER
    with ExitStack() as held:

        def open_logs() -> None:
            """Open the run's log file and its logger."""
            nonlocal logger
            held.enter_context(job_log(record.directory / LOG))
            logger = held.enter_context(open_logger(config, record.directory, methods.learned))

        parallel.on_main(open_logs)
        held.enter_context(half_products(getattr(torch, config.model.dtype), device))
        _stages(config, methods, record, logger, device, products)


def _fetch_from_hub(config: RunConfig, pruned: bool) -> None:
    """Download the texts of the hub before the weights, so that a missing text ends the job early.

    Raises DataError if the model or a text is not available. Without the hub it names the model.
    """
    if config.model.source == "hub":
        hub_snapshot(config.model.hub_name or "", config.model.revision, ["config.json"])
    for named in perplexity_texts(config.evaluation.perplexity):
        if isinstance(named.text, HubText):
            named.text.digest(calibration=False)
    text = calibration_text(config.calibration).text
    if isinstance(text, HubText) and not pruned:
        text.digest(calibration=True)


def _check_shares(config: RunConfig, methods: Methods, record: RunDirectory) -> None:
    """Raise ConfigError if some ranks would have no window of their own to learn from."""
    processes = parallel.world_size()
    for group, method in methods.learned.items():
        counts = {
            f"{group}.batch_size": method.batch_size,
            f"{group}.samples": getattr(method, "samples", None),
        }
        for name, value in (counts | {"calibration.samples": config.calibration.samples}).items():
            if value and value < processes and not record.has(group):
                raise ConfigError(
                    f"{name}={value}: {processes} processes need at least {name}={processes}"
                )


def export_of(config: RunConfig, methods: Methods) -> ExportConfig | None:
    """Return the settings of the export, with its dtype; None: the run has no export.

    Raises ConfigError if this run cannot have the export.
    """
    export = replace(config.export, dtype=config.export.dtype or config.model.dtype)
    if export.serve:
        check_serve(export, config.patterns)
    if export.form == "none":
        for key, value in asdict(config.export).items():
            if value != getattr(ExportConfig(), key):
                raise ConfigError(f"export.{key}={value} needs export=folded, gathered or simulate")
        return None
    if methods.change_weights and not config.save_weights:
        raise ConfigError(f"export={export.form} needs save_weights=true: weights are changed")
    if export.form == "folded" and methods.permutation.constraint == "free":
        raise ConfigError(
            "export=folded cannot fold free permutations: set permutation.constraint=foldable, or "
            "export=gathered, which keeps any permutation"
        )
    return export


def _stages(
    config: RunConfig,
    methods: Methods,
    record: RunDirectory,
    logger: RunLogger,
    device: torch.device,
    products: torch.dtype,
) -> None:
    seed_everything(config.seed, config.deterministic)
    reset_peak_memory(device)
    if not record.pruned:
        parallel.on_main(
            lambda: write_json(record.directory / ENVIRONMENT, environment(config.seed, device))
        )
    with record.stage("load", device):
        loaded = load_model(config.model, config.seed)
        if record.metrics.setdefault("model", parallel.share(loaded.identity)) != loaded.identity:
            raise DataError(
                f"{record.directory} began with {record.metrics['model']}, and its model is now "
                f"{loaded.identity}"
            )
        groups = checked_groups(config, methods, loaded.model)
        _check_perplexity_texts(config, loaded)
        further = methods.further(config.calibration.samples)
        windows = None if record.pruned else _calibration_windows(config, loaded, further)
    job = Job(config, methods, record, logger, loaded, groups, products)

    with record.stage("evaluate dense", device):
        evaluate(loaded, config.evaluation, "dense", record)
    if windows is None:
        log.info("continuing %s after pruning", record.directory)
        apply_record(loaded.model, loaded.identity, record.directory)
    else:
        record.metrics["texts"] = {
            "calibration": calibration_text(config.calibration).text.digest(calibration=True)
        }
        prune_model(job, lambda: windows)
    with record.stage("evaluate sparse", device):
        evaluate(loaded, config.evaluation, "sparse", record)

    record.finish()
    logger.summary(flat_figures(record.metrics))


def _check_perplexity_texts(config: RunConfig, loaded: LoadedModel) -> None:
    """Raise DataError if a text is too short or has tokens that the model does not know."""
    settings = config.evaluation.perplexity
    for named in perplexity_texts(settings):
        windows = perplexity_windows(loaded.tokenizer, named, settings, config.model.bos)
        check_windows(f"evaluation.perplexity: {named.name}", windows, loaded.model)


def _calibration_windows(config: RunConfig, loaded: LoadedModel, further: int) -> Tensor:
    """Return the windows of the calibration text and `further` windows after them.

    Errors as `_check_perplexity_texts`.
    """
    windows = calibration_tokens(
        loaded.tokenizer, config.calibration, config.seed, config.model.bos, further
    )
    check_windows("calibration", windows, loaded.model)
    return windows


def _export(settings: ExportConfig, record: RunDirectory) -> None:
    """Write the pruned model into the run directory, unless this export is there already."""
    wanted = asdict(settings) | {"config_hash": record.metrics["config_hash"]}
    target = record.directory / EXPORT
    summary = present_export(target)
    if summary is not None and summary.items() >= wanted.items():
        log.info("%s is there already", target)
    else:
        summary = export_run(record.directory, settings, target, overwrite=True)
    if record.metrics.get("export") != summary:
        record.metrics["export"] = summary
        record.save()
