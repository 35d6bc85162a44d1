"""Loggers of a run's numbers: Weights & Biases, MLflow, TensorBoard, or none."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from permllm.config import RunConfig, flatten
from permllm.errors import ConfigError, DataError, first_line
from permllm.runs import sweep
from permllm.runs.files import write_text
from permllm.runs.measures import nats_above_dense, pruning_minutes
from permllm.runs.names import HISTORY

log = logging.getLogger(__name__)

# In the run directory: the id of its W&B run, and the loggers that have its final numbers, a line each.
WANDB_ID, LOGGED = ".wandb-id", ".logged"
# Typed words that name the sweep, or say nothing about the result.
_NOT_IN_A_NAME = r"[+~]*(experiment|logger|runs_dir|run_dir|force)\b"
_LONGEST_NAME, _LONGEST_TAG = 128, 64  # of W&B
_NOT_IN_A_KEY = re.compile(r"[^\w./: -]")  # of MLflow
# MLflow sends nothing about its use, and a server that is down costs seconds.
_MLFLOW = {"DISABLE_TELEMETRY": "true", "HTTP_REQUEST_MAX_RETRIES": "2", "HTTP_REQUEST_TIMEOUT": "20"}
# Metrics with a value for each channel group, of which a logger has the mean; metrics that a logger does not have.
_BY_GROUP = ("retained_saliency", "output_error", "moved_channels")
_LEFT_OUT = ("evaluation", "sha256")


class RunLogger:
    """Sink of the numbers of one run; this one drops them."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one training step; steps count from 0 over all epochs and windows."""

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        """Log one line of `history.jsonl`; lines count from 1. None was not measured."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final numbers, whose names are joined by slashes."""


NO_LOGGER = RunLogger()


class _WandB(RunLogger):
    def __init__(self, run: Any) -> None:
        self._run, self._step = run, -1
        for prefix, axis in (("lcp", "lcp/step"), ("pass", "lcp/pass")):
            run.define_metric(axis, hidden=True)
            run.define_metric(f"{prefix}/*", step_metric=axis)
            run.define_metric(f"{prefix}/loss", step_metric=axis, summary="min")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        self._row({"lcp/step": step} | {f"lcp/{key}": value for key, value in values.items()}, 2 * step)

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        measured = {f"pass/{key}": value for key, value in values.items() if value is not None}
        self._row({"lcp/pass": number} | measured, max(2 * self._step + 1, number))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def _row(self, values: dict[str, Any], row: int) -> None:
        # The number follows from the step, so that a resumed run gives a step the number that it had; W&B drops rows that
        # it has already, with a warning each.
        if row >= self._run.starting_step:
            self._run.log(values, step=row, commit=True)


class _Tracked(RunLogger):
    """A tracker of accelerate, which gets nothing more after its first failure: a server must not cost a run its result."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._send({f"lcp/{key}": value for key, value in values.items()}, step)

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        self._send({f"pass/{key}": value for key, value in values.items()}, number)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._send(values, None)

    def _send(self, values: Mapping[str, Any], step: int | None) -> None:
        numbers = {_NOT_IN_A_KEY.sub("_", key): value for key, value in values.items() if isinstance(value, int | float)}
        try:
            if self._tracker is not None:
                self._tracker.log(numbers, step)
        except Exception as error:  # of a database, a connection, a disk
            log.warning("the logger fails (%s) and gets nothing more of this run", first_line(error))
            self._tracker = None


def flat_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run as one level, keys joined by slashes.

    A channel group's values are summarised by their mean. `minutes` (`pruning_minutes`) is the horizontal axis of a scatter
    plot, `nats_above_dense` the one number of several texts.
    """
    shown = {
        key: {"mean": statistics.fmean(value.values())} if key in _BY_GROUP else value
        for key, value in metrics.items()
        if key not in _LEFT_OUT
    }
    flat = {name: value for name, value in flatten(shown, "/").items() if isinstance(value, int | float | str)}
    # A name for each linear that has a pattern of its own; the settings say it in a word.
    flat = {name: value for name, value in flat.items() if not name.startswith(("sparsity/patterns/", "export/patterns/"))}
    nats = nats_above_dense(metrics.get("perplexity", {}))
    above = {} if nats is None else {"nats_above_dense": nats}
    return flat | {"minutes": pruning_minutes(metrics["seconds"])} | above


@contextmanager
def open_logger(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    """Open the logger that the group `logger` selects, and close it at the end, also when the run fails."""
    if config.force:
        (directory / LOGGED).unlink(missing_ok=True)
    name, mode = config.logger.name, _wandb_mode() if config.logger.name in ("auto", "wandb") else None
    if name == "auto":
        name = "none" if mode in (None, "disabled") else "wandb"
    if name == "none":
        yield NO_LOGGER
        return
    if name == "wandb":
        opened = _open_wandb(config, directory, mode or "offline")
    else:
        opened = (_open_mlflow if name == "mlflow" else _open_tensorboard)(config, directory)
    with opened as logger:
        yield logger
    if logger is not NO_LOGGER and name not in (logged := _logged(directory)):
        write_text(directory / LOGGED, "".join(f"{one}\n" for one in [*logged, name]))


def log_finished(config: RunConfig, directory: Path, metrics: dict[str, Any]) -> None:
    """Log a finished run, without its single steps, where the logger that is asked for does not have it yet."""
    if ("wandb" if config.logger.name == "auto" else config.logger.name) in ["none", *_logged(directory)]:
        return
    with open_logger(config, directory) as logger:
        if logger is NO_LOGGER:
            return
        for number, values in enumerate(_history(directory / HISTORY), 1):
            logger.log_pass(values, number)
        logger.summary(flat_figures(metrics))
    log.info("%s was finished before: the logger has its epochs and final numbers, and not its single steps", directory)


def _history(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not readable JSON: {first_line(error)}") from error


def _logged(directory: Path) -> list[str]:
    file = directory / LOGGED
    return file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else []


def described(config: RunConfig) -> dict[str, Any]:
    """Return the settings that make a run's results."""
    return config.identity | {key: config.resolved[key] for key in ("permutation", "evaluation")}


def _tags(config: RunConfig) -> dict[str, str]:
    """Return the words that runs are found by."""
    groups = ("pruner", "permutation", "mask") if "epochs" in config.mask else ("pruner", "permutation")
    methods = {group: str(getattr(config, group).get("name")) for group in groups}
    return methods | {"sparsity": config.sparsity, "model": config.model.name}


def _job_type(config: RunConfig) -> str:
    return "learn" if "epochs" in config.permutation or "epochs" in config.mask else "prune"


def job_group(config: RunConfig) -> str | None:
    """Return the group of W&B, or the tag `group` of MLflow: `logger.group`, else the sweep of the job, else None."""
    return (config.logger.group or os.environ.get(sweep.VARIABLE) or "")[:_LONGEST_NAME] or None


def job_name(directory: Path) -> str:
    """Return the name in W&B and MLflow: the typed words that say what the job is, else the run directory's name."""
    words = [word for word in sweep.overrides() if not re.match(_NOT_IN_A_NAME, word)]
    return " ".join(words)[:_LONGEST_NAME] or directory.name


def _wandb_mode() -> str | None:
    """Return `WANDB_MODE`, else "online" with a key, "offline" with one that cannot be verified, None without one."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    try:
        return "online" if wandb.login(prompt=False) else None
    except (wandb.errors.Error, OSError):
        return "offline"


def _wandb_id(config: RunConfig, directory: Path) -> str:
    """Return the id that a resumed run had before; a new one for a new run, and for force=true."""
    file = directory / WANDB_ID
    known = file.read_text(encoding="ascii", errors="replace").strip() if file.is_file() and not config.force else ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
        known = f"{config.hash}-{secrets.token_hex(4)}"
        write_text(file, known + "\n")
    return known


@contextmanager
def _open_wandb(config: RunConfig, directory: Path, mode: str) -> Iterator[RunLogger]:
    import wandb

    # All jobs of a sweep write below one folder, so that one `wandb sync` or `wandb leet` finds them.
    home = Path(config.paths.wandb_dir or os.environ.get("WANDB_DIR") or config.runs_dir)
    home.mkdir(parents=True, exist_ok=True)
    run_id = _wandb_id(config, directory)

    def start(mode: str) -> Any:
        return wandb.init(
            project=config.logger.project,
            group=job_group(config),
            name=job_name(directory),
            tags=[tag[:_LONGEST_TAG] for tag in _tags(config).values()],
            job_type=_job_type(config),
            config=described(config) | {"run_directory": str(directory), "config_hash": config.hash},
            id=run_id,
            # Offline, each attempt leaves a folder with this id; `wandb sync` sends them as one run, in the order of time.
            resume="allow",
            dir=str(home),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off"),
        )

    try:
        run = start(mode)
    except wandb.errors.Error as error:
        # A server that is down or refuses must not cost a run its result; `wandb sync` can send it later.
        log.warning("W&B cannot be reached (%s): this run is kept offline", first_line(error))
        run = start("offline")
    failed = True
    try:
        yield _WandB(run)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


@contextmanager
def _open_tensorboard(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    from accelerate.tracking import TensorBoardTracker

    if config.force:  # TensorBoard draws the curves of two runs in one folder as one
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
    tracker = TensorBoardTracker("tensorboard", logging_dir=directory)
    try:
        _start(tracker)
    except ImportError as error:
        raise ConfigError("logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'") from error
    tracker.log({"config": f"```\n{described(config)}\n```"})
    try:
        yield _Tracked(tracker)
    finally:
        tracker.finish()


@contextmanager
def _open_mlflow(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    """Open MLflow: a database in the runs folder, or the store that `MLFLOW_TRACKING_URI` names."""
    for key, value in _MLFLOW.items():
        os.environ.setdefault(f"MLFLOW_{key}", value)
    home = Path(config.runs_dir)
    home.mkdir(parents=True, exist_ok=True)
    try:
        import mlflow
        from accelerate.tracking import MLflowTracker

        for part in ("mlflow", "alembic"):
            logging.getLogger(part).setLevel(logging.WARNING)  # the tables that they make are no news
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').resolve()}"
        mlflow.set_tracking_uri(store)
        tags = _tags(config) | {"group": job_group(config) or "", "job_type": _job_type(config)}
        tags |= {"run_directory": str(directory), "config_hash": config.hash}
        # Nothing is kept there, but without a place MLflow makes a folder where the command runs.
        artifacts = (home / "mlartifacts").resolve().as_uri()
        tracker = MLflowTracker(config.logger.project, artifacts, tags=tags, run_name=job_name(directory))
        with FileLock(home / ".mlflow.db.lock"):  # two jobs of a sweep that make the tables at once break them
            _start(tracker)
        settings = flatten(described(config)).items()
        tracker.store_init_configuration({_NOT_IN_A_KEY.sub("_", key): str(value) for key, value in settings})
    except ModuleNotFoundError as error:
        raise ConfigError("logger=mlflow needs mlflow-skinny, sqlalchemy and alembic: pip install -e '.[mlflow]'") from error
    except Exception as error:  # of a database, a connection, MLflow
        log.warning("MLflow cannot be reached (%s): this run is in its run directory alone", first_line(error))
        yield NO_LOGGER
        return
    state = "FAILED"
    try:
        yield _Tracked(tracker)
        state = "FINISHED"
    finally:
        with suppress(Exception):  # the server may be gone
            mlflow.end_run(state)


def _start(tracker: Any) -> None:
    from accelerate.state import PartialState

    PartialState(cpu=True)  # which accelerate's trackers ask whether this is rank 0
    tracker.start()
