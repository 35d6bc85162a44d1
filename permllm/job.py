"""One job, top to bottom: load, calibrate, permute, prune, evaluate, record; and the jobs of a command."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from torch import Tensor

from permllm.config import ExportConfig, RunConfig, read_config
from permllm.data.registry import calibration_text, check_texts, perplexity_texts
from permllm.data.windows import calibration_tokens
from permllm.errors import ConfigError, DataError, InUseError, PermLLMError, everything_wanted, one_line
from permllm.evaluation.lm_eval import check_tasks
from permllm.evaluation.measure import evaluate
from permllm.evaluation.perplexity import perplexity_windows
from permllm.export.checkpoint import Request, clear_left_over, export_run, present_export
from permllm.export.rebuild import apply_record
from permllm.models.families import linear_at
from permllm.models.limits import check_windows
from permllm.models.load import LoadedModel, check_model_runs, load_model, meta_model
from permllm.models.selection import groups_to_prune
from permllm.pruning.composition import check_names, register_resolvers
from permllm.pruning.layerwise import PrunedModel
from permllm.pruning.methods import (
    Job,
    Methods,
    checked_groups,
    code_of,
    footprint_of,
    methods_of,
    needs_device,
    placement_for,
)
from permllm.pruning.plan import print_plan
from permllm.pruning.stages import figures, prune_model
from permllm.pruning.workers import assist, check_shares, loaded_by_all
from permllm.runs import evaluations, sweep
from permllm.runs.cache import clear_cache
from permllm.runs.cache_folder import choose_cache
from permllm.runs.directory import RunRecord, is_finished, run_directory
from permllm.runs.environment import environment
from permllm.runs.evaluations import mean_accuracy
from permllm.runs.figures import earlier_figures, flat_figures, print_run
from permllm.runs.files import write_record
from permllm.runs.job_log import job_log
from permllm.runs.loggers import RunLogger, open_logger
from permllm.runs.names import ENVIRONMENT, EXPORT, LOG, MASKS, PERMUTATIONS, WEIGHTS, WRITTEN_EXPORT
from permllm.runs.outcomes import Outcome
from permllm.runs.printed import print_comparison, print_jobs
from permllm.runs.read import collect
from permllm.runs.run_tensors import write_masks, write_orders
from permllm.runs.table import summarise
from permllm.runs.tensors import write_tensors
from permllm.runtime import parallel
from permllm.runtime.devices import resolve_device
from permllm.runtime.interruption import CONTINUES, exit_code, is_interruption, scheduler_signals, started, what_happened
from permllm.runtime.memory import SPARING, keep_freed_memory, reset_peak_memory, return_freed_memory
from permllm.runtime.precision import compute_dtype, half_products
from permllm.runtime.seeding import seed_everything
from permllm.runtime.watch import FAILED, INTERRUPTED

log = logging.getLogger(__name__)


def run(config: RunConfig) -> tuple[dict[str, Any], Path] | None:
    """Run one job, under torchrun the part of rank 0, which keeps the record; `permllm.pruning.workers` has the other ranks.

    Returns:
        The metrics and the run directory; None when only a plan was asked for.

    Raises:
        PermLLMError: with one line for the person who started it.
    """
    choose_cache(config.paths.cache_dir)
    check_texts(config.calibration, config.evaluation.perplexity)
    methods = methods_of(config)
    request = export_request(config, methods)
    device = resolve_device(config.model.device)
    if not config.plan:
        parallel.use_device(device)
    if device.type == "cpu":
        keep_freed_memory()
        return_freed_memory()  # an earlier job's, or it would count as taken
    skeleton = cache(partial(meta_model, config.model))
    if config.plan or config.model.source != "hub" or config.model.architecture:
        checked_groups(config, methods, skeleton())
        if config.plan:
            footprint = footprint_of(config, methods, skeleton(), device)
            print_plan(footprint, placement_for(footprint, config, methods), needs_device(config, methods))
            return None

    record = RunRecord(run_directory(config), config, config.force)
    with record.opened():
        clear_left_over(record.path(WRITTEN_EXPORT))
        record.compare_code(code_of(config, methods))
        if record.finished:
            log.info("%s is finished already; force=true runs it again", record.directory)
        else:
            check_tasks(config.evaluation)
            if record.begun:
                record.forget_what_is_broken(groups_to_prune(skeleton(), config), config.pattern)
            learns = {group: method for group, method in methods.learned.items() if not record.has(group)}
            footprint = footprint_of(config, methods, skeleton(), device)
            placement = placement_for(footprint, config, methods)
            config = replace(config, model=replace(config.model, placement=placement))
            if device.type == "cpu" and placement == "disk":
                keep_freed_memory(SPARING)
            if not record.pruned:
                record.metrics |= {"placement": placement, "planned_memory_bytes": footprint.peak(placement)}
            if learns:
                check_shares(learns, config.calibration.samples)
            half = half_products(getattr(torch, config.model.dtype), device)
            with job_log(record.path(LOG)), open_logger(config, record.directory) as logger, half:
                _stages(config, methods, record, logger, device, bool(learns))
        if request is not None:
            _export(request, record)
        print_run(record.metrics, record.directory)
    return record.metrics, record.directory


def export_request(config: RunConfig, methods: Methods) -> Request | None:
    """What to export; None for nothing.

    Raises:
        ConfigError: it cannot be had from this run.
    """
    export = config.export
    if export.form == "none":
        usual = asdict(ExportConfig())
        for key, value in asdict(export).items():
            if value != usual[key]:
                raise ConfigError(f"export.{key}={value} needs export=folded, gathered or simulate")
        return None
    request = Request(export.form, export.dtype, export.shard_gb)
    request.check()
    if methods.change_weights and not config.save_weights:
        raise ConfigError(f"export={export.form} needs the changed weights, and save_weights=false does not keep them")
    if export.form == "folded" and methods.permutation.constraint == "free":
        raise ConfigError(
            "export=folded cannot fold free permutations into the neighbouring weights: set permutation.constraint=foldable, "
            "or export=gathered, which keeps any permutation"
        )
    return request


def _stages(
    config: RunConfig, methods: Methods, record: RunRecord, logger: RunLogger, device: torch.device, learns: bool
) -> None:
    seed_everything(config.seed)
    reset_peak_memory(device)
    clear_cache()
    if not record.other_evaluations:  # of what is pruned, which is pruned already where they are
        write_record(record.path(ENVIRONMENT), environment(config.seed, device))
    with record.stage("load", device):
        # Not before: what fails here until the model is loaded fails without the others.
        if learns or config.model.placement == "sharded":
            parallel.tell(parallel.PREPARE, asdict(config))
        with loaded_by_all(config):
            loaded = load_model(config.model, config.seed)
        if config.model.placement == "sharded":
            check_model_runs(config.model, loaded.model)
        if record.metrics.setdefault("model", loaded.identity) != loaded.identity:
            began = record.metrics["model"]
            raise DataError(f"{record.directory} began with {began}, and the model is now {loaded.identity}")
        groups = checked_groups(config, methods, loaded.model)
        _check_amounts(config, loaded, record.pruned)
    products = compute_dtype(config.compute_dtype, loaded.model.dtype, device)
    job = Job(config, methods, record, logger, loaded, groups, products)

    _evaluate(job, record, "dense")
    if record.pruned:
        log.info("continuing %s after pruning", record.directory)
        apply_record(loaded.model, loaded.identity, record.directory)
    else:
        _prune(job, record)
    _evaluate(job, record, "sparse")

    record.finish()
    logger.summary(flat_figures(record.metrics), earlier_figures(record.metrics))


def _check_amounts(config: RunConfig, loaded: LoadedModel, pruned: bool) -> None:
    """Raise DataError, before anything is computed, where a text is too short or has tokens that the model does not know."""
    tokenizer, model = loaded.tokenizer, loaded.model
    for named in perplexity_texts(config.evaluation.perplexity):
        windows = perplexity_windows(tokenizer, named, config.evaluation.perplexity, config.model.bos)
        check_windows(f"evaluation.perplexity: {named.name}", windows, model)
    if not pruned:
        windows = calibration_tokens(tokenizer, config.calibration, config.seed, config.model.bos, config.further)
        check_windows("calibration", windows, model)


def _evaluate(job: Job, record: RunRecord, which: str) -> None:
    with record.stage(f"evaluate {which}", job.device):
        entry = record.evaluation
        evaluation: dict[str, Any] = {key: entry[key] for key in ("evaluation", "perplexity", "tasks") if key in entry}
        evaluation["scores"] = record.scores.setdefault(entry["evaluation_hash"], {})

        def save() -> None:
            entry.update({key: evaluation[key] for key in ("perplexity", "tasks") if key in evaluation})
            for name, digest in evaluation.get("evaluated_texts", {}).items():
                evaluations.note_text(entry, name, digest)
            record.save()

        evaluate(job.loaded, job.config.evaluation, which, evaluation, save)


def _prune(job: Job, record: RunRecord) -> None:
    """Calibrate, find the orders, prune: the model is sparse afterwards, and the record holds what rebuilds it."""
    shutil.rmtree(record.path(EXPORT), ignore_errors=True)  # of an earlier attempt, whose tensors are gone
    record.note_code(code_of(job.config, job.methods))

    def tokens() -> Tensor:
        digest = calibration_text(job.config.calibration).text.digest(calibration=True)
        record.metrics.setdefault("texts", {})["calibration"] = digest
        config = job.config
        return calibration_tokens(job.loaded.tokenizer, config.calibration, config.seed, config.model.bos, config.further)

    def keep(pruned: PrunedModel) -> None:
        write_orders(record.path(PERMUTATIONS), pruned.orders)
        write_masks(record.path(MASKS), pruned.masks)
        found = figures(job, pruned)
        if found["sparsity"]["weights_kept"]:
            planned = {path: linear_at(job.loaded.model, path).weight for path in pruned.masks}
            write_tensors(record.path(WEIGHTS), planned, make=job.weight)
        record.metrics |= found

    prune_model(job, tokens, keep)


def _export(request: Request, record: RunRecord) -> None:
    """Write the pruned model into the run directory, unless it is there already in this form."""
    wanted = {"form": request.form, "dtype": request.dtype or record.config["model"]["dtype"]}
    wanted |= {"config_hash": record.metrics["config_hash"], "shard_gb": request.shard_gb}
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


# Packages whose errors are those of a launcher's processes.
_LAUNCHERS = ("submitit", "joblib", "loky")


class Session:
    """The jobs of one command: one, or those of a sweep, which a launcher may run in other processes."""

    def __init__(self) -> None:
        self._failed = False

    def of(self, main: Callable[[], Any]) -> int:
        """Run what Hydra made of the command line, and end it: the exit code."""
        started()
        try:
            with scheduler_signals():
                main()
        except KeyboardInterrupt as error:  # between jobs, or while those of other processes were waited for
            if parallel.rank() == 0:
                print(f"{what_happened(error)}: {CONTINUES}", file=sys.stderr)
            self.close()
            parallel.stop(INTERRUPTED)
            return exit_code(error)
        except SystemExit as stop:
            # Hydra refuses the command line, or a launcher gives up although some jobs have finished.
            if stop.code == 1:
                self.close()
            raise
        except Exception as error:
            if everything_wanted() or type(error).__module__.partition(".")[0] not in _LAUNCHERS:
                raise
            # One of its processes was killed, or ran out of its time: the others have left what they did. Only the last lines
            # of such a message may say why.
            print(f"error: {type(error).__name__}: {str(error).strip()}\n{CONTINUES}", file=sys.stderr)
            self.close()
            return 1
        code = self.close()
        parallel.stop()
        return code

    def job(self, composed: DictConfig) -> float:
        """Run one job. A failure that a person can mend is one line on stderr, and does not stop the other jobs.

        Under torchrun that holds for all processes, which go through the jobs together as the first one says
        (`permllm.runtime.parallel`). Only where one of them fails alone in the middle of learning, all end.

        Returns:
            What a search minimises (`objective`), in all processes; infinite for a job that failed: a sampler then avoids it.

        Raises:
            SystemExit: with code 130, 143 or 129 where Ctrl-C, SIGTERM or SIGHUP stops it, after a table of what was done
                before; with code 1 where the processes have lost each other.
        """
        register_resolvers()  # a launcher's process has begun with this
        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name in ("httpx", "httpx2", "huggingface_hub"):  # the middle one is what huggingface_hub 2 speaks through
            logging.getLogger(name).setLevel(logging.ERROR)
        if sweep.sweeping():
            sweep.share_cores()
            if parallel.several() and sweep.launched_elsewhere():
                text = (
                    "torchrun's processes go through the jobs of a sweep together, one after the other: hydra/launcher=basic"
                )
                self._done("failed", text)
                print(f"error: {text}", file=sys.stderr)
                return math.inf
        parallel.start()
        try:
            with scheduler_signals():  # in a launcher's process too
                value = self._assist() if parallel.rank() else self._lead(composed)
            if parallel.rank():
                return value
            if parallel.out_of_step():
                self.close()
                print(f"the other processes are in the middle of a step and end too: {CONTINUES}", file=sys.stderr)
                raise SystemExit(1)
            parallel.tell(parallel.OVER, value)
            return value
        except BaseException as error:
            parallel.stop(INTERRUPTED if isinstance(error, SystemExit) and is_interruption(error.code) else FAILED)
            raise

    def _assist(self) -> float:
        """A job in a process beside the first, which writes no outcome and prints nothing that the first one prints."""
        logging.getLogger("permllm").setLevel(logging.WARNING)
        try:
            return assist()
        except KeyboardInterrupt as error:
            raise SystemExit(exit_code(error)) from None
        except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
            print(f"error: the process of rank {parallel.rank()}: {one_line(error)}: {CONTINUES}", file=sys.stderr)
            raise SystemExit(1) from error

    def _lead(self, composed: DictConfig) -> float:
        """A job in the only process, or in the first of several."""
        try:
            config = read_config(sweep.place_record(composed))
            check_names(config)
            skipped = not config.force and is_finished(run_directory(config), config.evaluation_identity)
            result = run(config)
            if result is None:
                return math.inf
            metrics, directory = result
            self._done("skipped" if skipped else "ran", directory=str(directory))
            return objective(metrics)
        except KeyboardInterrupt as error:
            self._done("failed", f"{what_happened(error)}: the same command continues it")
            print(f"{what_happened(error)}: {CONTINUES}", file=sys.stderr)
            self.close()
            raise SystemExit(exit_code(error)) from None
        except InUseError as error:
            if not sweep.sweeping():
                self._failed = True
                print(f"error: {error}", file=sys.stderr)
            self._done("skipped", one_line(error))
        except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
            if everything_wanted():
                raise
            text = one_line(error)
            self._done("failed", text)
            print(f"error: {text}", file=sys.stderr)
        except Exception as error:
            if not sweep.sweeping():
                raise
            # An error of ours must be seen whole, and still not take the other jobs with it.
            traceback.print_exc()
            self._done("failed", f"{type(error).__name__}: {one_line(error)}")
        return math.inf

    def close(self) -> int:
        """Print the comparison where there is one to make, and what became of each job of several; the exit code.

        Under torchrun the first process does that for all.
        """
        if parallel.rank():
            return 0
        jobs = sweep.outcomes()
        if len(jobs) > 1:
            shared = set.intersection(*(set(job.overrides) for job in jobs))
            labels = [" ".join(word for word in job.overrides if word not in shared) for job in jobs]
            finished = [Path(job.directory) for job in jobs if job.directory]
            runs = collect(finished).runs if finished else []
            if len(runs) > 1:
                print_comparison(summarise(runs))
            outcomes = [(job.outcome, job.reason or job.directory or "") for job in jobs]
            print_jobs([(label, *outcome) for label, outcome in zip(labels, outcomes, strict=True)])
        return 1 if self._failed or any(job.outcome == "failed" for job in jobs) else 0

    def _done(self, outcome: str, reason: str = "", directory: str | None = None) -> None:
        self._failed = self._failed or outcome == "failed"
        if sweep.sweeping():
            try:
                sweep.keep(Outcome(sweep.overrides(), outcome, reason, directory))
            except DataError as error:
                # A full disk must not take the other jobs with it.
                print(f"error: {error}", file=sys.stderr)


def objective(metrics: dict[str, Any]) -> float:
    """The sparse model's perplexity, of several texts the geometric mean, else 1 less its mean accuracy, else infinite."""
    found = [float(values["value"]) for values in metrics.get("perplexity", {}).get("sparse", {}).values()]
    if found:
        return found[0] if len(found) == 1 else math.exp(statistics.fmean(map(math.log, found)))
    accuracy = mean_accuracy(metrics.get("zero_shot", {}).get("sparse", {}))
    return math.inf if math.isnan(accuracy) else 1 - accuracy


# Of this process.
SESSION = Session()
