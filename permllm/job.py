"""One job from its settings to its record, in the order of the diagram in docs/method.md.

A run is what its settings identify. A job is the work of one process on it. `parallel.on_main` lets
rank 0 work and gives its result, or its error, to all ranks.
"""

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permllm.data.hub import hub_snapshot
from permllm.data.lookup import JobTexts, texts_of_job
from permllm.data.texts import Text
from permllm.data.windows import calibration_windows
from permllm.errors import ConfigError, DataError, first_line
from permllm.evaluation.lm_eval import download_tasks
from permllm.evaluation.measure import evaluate
from permllm.evaluation.perplexity import perplexity_windows
from permllm.export.apply import apply_record
from permllm.export.serve import check_serve, groups_on_kernels
from permllm.export.write import export_run, present_export, write_card
from permllm.models.load import LoadedModel, check_windows, load_model, meta_model, with_dtype
from permllm.planning.footprint import Footprint
from permllm.planning.placement import placement_for
from permllm.planning.plan import print_plan
from permllm.pruning.checks import warn_if_pruned
from permllm.pruning.layerwise import PrunedModel, prune_layers, record_pruning
from permllm.pruning.methods import Job, Methods, ModelGroups, checked_groups, methods_of
from permllm.pruning.phases import (
    allocate,
    calibrate,
    find_masks,
    find_permutations,
)
from permllm.report.metrics import flat_metrics
from permllm.report.printed import print_run
from permllm.report.table import gap_of
from permllm.runtime import parallel
from permllm.runtime.devices import resolve_device, seed_everything
from permllm.runtime.memory import (
    SPARING,
    keep_freed_memory,
    reset_peak_memory,
    return_freed_memory,
)
from permllm.settings.composition import sweeping
from permllm.settings.config import ExportConfig, RunConfig
from permllm.store.directory import RunDirectory, run_directory
from permllm.store.environment import environment
from permllm.store.files import ENVIRONMENT, EXPORT, LOG, MASKS, PERMUTATIONS, write_json
from permllm.store.loggers import NO_LOGGER, job_log, open_logger
from permllm.store.tensors import save_masks, save_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """Result of a job.

    Attributes:
        metrics: content of `metrics.json`.
        directory: run directory.
        skipped: True: an earlier process had finished the run.
    """

    metrics: dict[str, Any]
    directory: Path
    skipped: bool


def run(config: RunConfig) -> JobResult | None:
    """Run one job, under torchrun in all ranks. Rank 0 keeps the record.

    Returns None after `plan=true`.

    Raises:
        PermLLMError: an error that the user can fix, or a plan in which nothing fits.
    """
    model = parallel.on_main(lambda: with_dtype(config.model))
    config = replace(config, model=model)
    texts = texts_of_job(config.calibration, config.evaluation)
    methods = methods_of(config)
    export = export_of(config, methods)
    device = _prepared_device(config)
    if config.plan:
        footprint = _footprint(config, methods, torch.device("cuda") if config.plan_on else device)
        parallel.on_main(lambda: print_plan(footprint))
        return None

    record = RunDirectory(run_directory(config), config)
    with record.opened(config.force, wait=not sweeping()):
        skipped = record.is_finished()
        if skipped and not sweeping():
            log.info("%s is finished already; force=true runs and logs it again", record.directory)
        if not skipped:
            _work(config, methods, texts, record, device)
        if export is not None:
            parallel.on_main(lambda: _export(export, record, skipped))
        if parallel.rank() == 0 and not sweeping():
            print_run(record.metrics, record.directory)
    return JobResult(record.metrics, record.directory, skipped)


def _work(
    config: RunConfig,
    methods: Methods,
    texts: JobTexts,
    record: RunDirectory,
    device: torch.device,
) -> None:
    """Load the model, evaluate it, prune it, evaluate it again.

    Each of these continues from the files that an earlier process of the run has left.
    """
    footprint = _footprint(config, methods, device)
    parallel.on_main(lambda: _download(config, texts, record.pruned))
    config = _placed(config, footprint, device)
    planned = footprint.needs(config.model.placement).peak  # before the model takes memory
    with ExitStack() as logs:
        if parallel.rank() == 0:
            logs.enter_context(job_log(record.directory / LOG))
        seed_everything(config.seed, config.deterministic)
        reset_peak_memory(device)
        compute_dtype = footprint.compute_dtype
        with record.phase("load", device):
            loaded = load_model(config.model, config.seed, footprint.dtype)
            _check_same(record, "model", loaded.identity)
            text_windows = _perplexity_windows(config, texts, loaded)
            # A logger follows when the record has begun, which removes files of an earlier run.
            job = Job(config, methods, record, NO_LOGGER, loaded, footprint.groups, compute_dtype)
            if not record.pruned:
                _begin_pruning(job, record, texts, planned)
        if texts.perplexity:
            record.evaluation["evaluated_texts"] = parallel.on_main(texts.perplexity_digests)
        if parallel.rank() == 0:
            job.logger = logs.enter_context(
                open_logger(config, record.directory, learns=bool(methods.learned))
            )

        with record.phase("evaluate dense", device):
            evaluate(loaded, config.evaluation, text_windows, "dense", record)
        if record.pruned:
            log.info("continuing %s after pruning", record.directory)
            apply_record(loaded.model, loaded.identity, record.directory)
        else:
            prune_model(job)
        with record.phase("evaluate sparse", device):
            evaluate(loaded, config.evaluation, text_windows, "sparse", record)
        record.finish()
        if job.logger is not NO_LOGGER:
            job.logger.summary(_gap(record.directory) | flat_metrics(record.metrics))


def _gap(directory: Path) -> dict[str, float]:
    """Return `gap_closed` of a finished run; empty: the runs beside it do not give it."""
    try:
        return gap_of(directory)
    except Exception as error:  # files of other runs must not fail a finished one
        log.warning("gap_closed is not logged: %s", first_line(error))
        return {}


def _placed(config: RunConfig, footprint: Footprint, device: torch.device) -> RunConfig:
    placement = parallel.broadcast(placement_for(footprint))
    if device.type == "cpu" and placement == "disk":
        keep_freed_memory(SPARING)
    return replace(config, model=replace(config.model, placement=placement))


def _begin_pruning(job: Job, record: RunDirectory, texts: JobTexts, planned: int) -> None:
    """Give the job the windows of the calibration text, and begin the record of a run that prunes.

    With `force=true` files of an earlier run are replaced here, when the job has all that it needs.
    `planned` is the memory of the plan in bytes.
    """
    config = job.config
    record.set_compute_dtype(job.compute_dtype)
    record.metrics["placement"] = config.model.placement
    record.metrics["planned_memory_bytes"] = planned
    warn_if_pruned(job.loaded.model, job.groups.pruned, config.pattern)
    job.windows = job_windows(job, texts.calibration, "calibration")
    digest = parallel.on_main(lambda: texts.calibration.digest(calibration=True))
    _check_same(record, "texts", {"calibration": digest})
    record.begin()
    if parallel.rank() == 0:
        write_json(record.directory / ENVIRONMENT, environment(config.seed, job.device))


def prune_model(job: Job) -> PrunedModel:
    """Prune the job's model in place: calibrate, allocate, permute, mask, prune.

    Statistics of the dense model give the permutations and masks of all layers at once. Sequential
    statistics come from the pruned layers before. Where permutations or masks are None, each layer
    finds its own while it is pruned.

    Args:
        job: job with model, methods and windows. Its record keeps seconds, metrics and files.
    """
    calibration = calibrate(job)
    if job.methods.allocation is not None:
        job = allocate(job, calibration)
        _check_kernels(job.config, job.loaded.model, job.groups)
    permutations = find_permutations(job, calibration)
    masks = find_masks(job, calibration, permutations)
    is_sequential = job.config.calibration.statistics == "sequential"
    factors = None if is_sequential else calibration.factors
    del calibration  # frees the dense states, the targets of learning
    with job.record.phase("prune", job.device):
        pruned = prune_layers(job, factors=factors, permutations=permutations, masks=masks)
        if permutations is None:
            job.record.write(PERMUTATIONS, pruned.permutations, save_tensors)
        if masks is None:
            job.record.write(MASKS, pruned.masks, save_masks)
        record_pruning(job, pruned)
    return pruned


def _prepared_device(config: RunConfig) -> torch.device:
    device = resolve_device(config.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        return_freed_memory()  # memory that an earlier job freed would count as taken
        keep_freed_memory()
    return device


def _footprint(config: RunConfig, methods: Methods, device: torch.device) -> Footprint:
    model = meta_model(config.model)
    groups = checked_groups(config, methods, model)
    _check_kernels(config, model, groups)
    return Footprint(config, model, methods, groups, device)


def _check_kernels(config: RunConfig, model: PreTrainedModel, groups: ModelGroups) -> None:
    """Raise ConfigError if vLLM's kernels for 2:4 are asked for and no pruned group fits them."""
    if config.export.serve:
        groups_on_kernels(model.config.model_type, groups.every, groups.pruned, config.pattern)


def _download(config: RunConfig, texts: JobTexts, pruned: bool) -> None:
    """Download texts and tasks before the weights, so that a missing one ends the job early."""
    if config.model.source == "hub":  # first, so that without the hub the error names the model
        hub_snapshot(config.model.hub_name or "", config.model.revision, ["config.json"])
    texts.download(calibration=not pruned)
    texts.check_tasks(download_tasks(config.evaluation))


def export_of(config: RunConfig, methods: Methods) -> ExportConfig | None:
    """Return the settings of the export, with its dtype; None: the run has no export.

    Raises ConfigError if this run cannot have the export.
    """
    dtype: Any = config.model.dtype  # `with_dtype` has replaced `auto`
    export = replace(config.export, dtype=config.export.dtype or dtype)
    if export.serve:
        check_serve(export)
    if export.form == "none":
        for key, value in asdict(config.export).items():
            if value != getattr(ExportConfig(), key):
                raise ConfigError(f"export.{key}={value} needs export=folded, gathered or simulate")
        return None
    if methods.change_weights and not config.save_weights:
        raise ConfigError(f"export={export.form} needs save_weights=true: weights are changed")
    permutation = methods.permutation
    if export.form == "folded" and permutation and permutation.constraint == "free":
        raise ConfigError(
            "export=folded cannot fold free permutations: set permutation.constraint=foldable, or "
            "export=gathered, which keeps any permutation"
        )
    return export


def _check_same(record: RunDirectory, key: str, identity: Any) -> None:
    """Raise DataError if an earlier process of the run had another model or other texts."""
    before = record.metrics.setdefault(key, parallel.broadcast(identity))
    if before != identity:
        raise DataError(
            f"{record.directory} began with {key} {before}, and here it is {identity}; force=true "
            "runs it again"
        )


def _perplexity_windows(
    config: RunConfig, texts: JobTexts, loaded: LoadedModel
) -> dict[str, Tensor]:
    settings = config.evaluation.perplexity
    return {
        name: perplexity_windows(loaded, text, settings, f"evaluation.perplexity: {name}")
        for name, text in texts.perplexity.items()
    }


def job_windows(job: Job, text: Text, name: str) -> Tensor:
    """Return the windows of a text on which a job calibrates, and then those for learning alone.

    Errors begin with `name`.
    """
    settings = job.config.calibration
    windows = calibration_windows(
        job.loaded.tokenizer,
        text,
        settings,
        job.config.seed,
        job.loaded.bos,
        job.methods.extra_windows(settings.samples),
    )
    check_windows(name, windows, job.loaded.model)
    return windows


def _export(settings: ExportConfig, record: RunDirectory, skipped: bool) -> None:
    """Write the pruned model into the run directory, unless this export is there already.

    An export that is there gets a new card, unless the run was skipped.
    """
    wanted = asdict(settings) | {"config_hash": record.metrics["config_hash"]}
    target = record.directory / EXPORT
    summary = present_export(target)
    if summary is not None and summary.items() >= wanted.items():
        log.info("%s is there already", target)
        if not skipped:
            write_card(target, record.directory, summary)
    else:
        summary = export_run(record.directory, settings, target, overwrite=True)
    if record.metrics.get("export") != summary:
        record.metrics["export"] = summary
        record.save()
