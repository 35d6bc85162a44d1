"""Loggers of a run's numbers: Weights & Biases, MLflow, TensorBoard, or none."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import MLflowTracker, TensorBoardTracker
from filelock import FileLock

from permllm.config import RunConfig, flatten
from permllm.errors import ConfigError, first_line
from permllm.runs import sweep
from permllm.runs.files import TENSORBOARD, WANDB_ID, write_text

log = logging.getLogger(__name__)

# Typed words that name the sweep, or say nothing about the result.
_NOT_IN_A_NAME = r"[+~]*(experiment|logger|runs_dir|run_dir|force)\b"
_LONGEST_NAME, _LONGEST_TAG = 128, 64  # of W&B
_NOT_IN_A_KEY = re.compile(r"[^\w./: -]")  # of MLflow
# MLflow sends nothing about its use, and a server that is down costs seconds.
_MLFLOW = {"MLFLOW_DISABLE_TELEMETRY": "true"}
_MLFLOW |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class RunLogger:
    """Sink of the numbers of one run; this one drops them."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one training step; steps count from 0 over all epochs and windows."""
        self._send("lcp/", values, step)

    def log_epoch(self, values: Mapping[str, Any], number: int) -> None:
        """Log one line of `history.jsonl`; lines count from 1. None was not measured."""
        measured = {key: value for key, value in values.items() if value is not None}
        self._send("epoch/", measured, number)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final numbers, whose names are joined by slashes."""
        self._send("", values, None)

    def close(self, failed: bool) -> None:
        """End the run in the logger."""

    def _send(self, kind: str, values: Mapping[str, Any], number: int | None) -> None:
        pass


NO_LOGGER = RunLogger()


class _WandB(RunLogger):
    def __init__(self, run: Any) -> None:
        self._run, self._step = run, -1
        for kind, axis in (("lcp", "lcp/step"), ("epoch", "lcp/epoch")):
            run.define_metric(axis, hidden=True)
            run.define_metric(f"{kind}/*", step_metric=axis)
            run.define_metric(f"{kind}/loss", step_metric=axis, summary="min")

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _send(self, kind: str, values: Mapping[str, Any], number: Any) -> None:
        if not kind:
            self._run.summary.update(dict(values))
            return
        # A resumed run gives a step the row that it had before. W&B drops rows that it has already,
        # with a warning each.
        self._step = number if kind == "lcp/" else self._step
        row = 2 * number if kind == "lcp/" else max(2 * self._step + 1, number)
        if row >= self._run.starting_step:
            axis = {"lcp/step" if kind == "lcp/" else "lcp/epoch": number}
            named = {f"{kind}{key}": value for key, value in values.items()}
            self._run.log(axis | named, step=row, commit=True)


class _Tracked(RunLogger):
    """A tracker of accelerate, which gets nothing more after its first failure."""

    def __init__(self, tracker: Any, end: Callable[[bool], None]) -> None:
        self._tracker, self._end = tracker, end

    def close(self, failed: bool) -> None:
        with suppress(Exception):  # the server may be gone
            self._end(failed)

    def _send(self, kind: str, values: Mapping[str, Any], number: int | None) -> None:
        if self._tracker is None:
            return
        named = {_NOT_IN_A_KEY.sub("_", f"{kind}{key}"): value for key, value in values.items()}
        numbers = {key: value for key, value in named.items() if isinstance(value, int | float)}
        try:
            self._tracker.log(numbers, number)
        except Exception as error:  # of a database, a connection, a disk
            self._tracker = None
            log.warning("the logger fails (%s) and gets nothing more", first_line(error))


@contextmanager
def open_logger(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    """Open the logger that the group `logger` selects, and close it, also when the run fails."""
    openers = {"mlflow": _open_mlflow, "tensorboard": _open_tensorboard}
    open_it = openers.get(config.logger.name, _open_wandb)
    logger = NO_LOGGER if config.logger.name == "none" else open_it(config, directory)
    failed = True
    try:
        yield logger
        failed = False
    finally:
        logger.close(failed)


def described(config: RunConfig, directory: Path) -> dict[str, Any]:
    """Return the name of a run in W&B and MLflow, its group, kind of job, tags and settings."""
    words = [word for word in sweep.overrides() if not re.match(_NOT_IN_A_NAME, word)]
    group = (config.logger.group or os.environ.get(sweep.VARIABLE) or "")[:_LONGEST_NAME]
    methods = {"pruner": config.pruner, "permutation": config.permutation, "mask": config.mask}
    if "epochs" not in config.mask:
        del methods["mask"]
    tags = {group: str(method.get("name")) for group, method in methods.items()}
    evaluated = {key: config.resolved[key] for key in ("permutation", "evaluation")}
    return {
        "name": " ".join(words)[:_LONGEST_NAME] or directory.name,
        "group": group or None,
        "job_type": "learn" if "epochs" in {**config.permutation, **config.mask} else "prune",
        "tags": tags | {"sparsity": config.sparsity, "model": config.model.name},
        "config": config.identity | evaluated,
        "where": {"run_directory": str(directory), "config_hash": config.hash},
    }


def _open_wandb(config: RunConfig, directory: Path) -> RunLogger:
    """Open a run of W&B as `WANDB_MODE` says, else online with a key.

    Without a key it is offline, or none where `logger=auto`.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else None)
    except (wandb.errors.Error, OSError):  # the key cannot be verified
        mode = "offline"
    if config.logger.name == "auto" and mode in (None, "disabled"):
        return NO_LOGGER
    # All jobs of a sweep write below one folder, so that one `wandb sync` finds them.
    home = Path(config.paths.wandb_dir or os.environ.get("WANDB_DIR") or config.runs_dir)
    home.mkdir(parents=True, exist_ok=True)
    # Offline, each attempt leaves a folder with the same id; `wandb sync` sends them as one run.
    file = directory / WANDB_ID
    if not file.is_file():
        write_text(file, f"{config.hash}-{secrets.token_hex(4)}\n")
    told = described(config, directory)
    run: dict[str, Any] = {key: told[key] for key in ("name", "group", "job_type")}
    run |= {"id": file.read_text().strip(), "resume": "allow", "dir": str(home)}
    run |= {"project": config.logger.project, "config": told["config"] | told["where"]}
    run["tags"] = [tag[:_LONGEST_TAG] for tag in told["tags"].values()]
    run["settings"] = wandb.Settings(silent=True, console="off")
    try:
        return _WandB(wandb.init(mode=mode or "offline", **run))  # type: ignore[arg-type]
    except wandb.errors.Error as error:  # `wandb sync` can send the run later
        log.warning("W&B cannot be reached (%s): this run is kept offline", first_line(error))
        return _WandB(wandb.init(mode="offline", **run))


def _open_tensorboard(config: RunConfig, directory: Path) -> RunLogger:
    PartialState(cpu=True)  # which accelerate's trackers ask whether this is rank 0
    tracker = TensorBoardTracker(TENSORBOARD, logging_dir=directory)
    try:
        tracker.start()
    except ImportError as error:
        raise ConfigError("logger=tensorboard needs: pip install -e '.[tensorboard]'") from error
    tracker.log({"config": f"```\n{described(config, directory)['config']}\n```"})
    return _Tracked(tracker, lambda failed: tracker.finish())


def _open_mlflow(config: RunConfig, directory: Path) -> RunLogger:
    """Open a run of MLflow in the runs folder, or where `MLFLOW_TRACKING_URI` says."""
    os.environ.update(_MLFLOW | dict(os.environ))
    home, run = Path(config.runs_dir).resolve(), described(config, directory)
    home.mkdir(parents=True, exist_ok=True)
    database = f"sqlite:///{home / 'mlflow.db'}"
    tags = run["tags"] | run["where"] | {"group": run["group"] or "", "job_type": run["job_type"]}
    for part in ("mlflow", "alembic"):  # the tables that they make are no news
        logging.getLogger(part).setLevel(logging.WARNING)
    try:
        import mlflow

        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or database)
        PartialState(cpu=True)
        # Nothing is kept in the folder, but without one MLflow makes it where the command runs.
        artifacts, name = (home / "mlartifacts").as_uri(), run["name"]
        tracker = MLflowTracker(config.logger.project, artifacts, tags=tags, run_name=name)
        with FileLock(home / ".mlflow.db.lock"):  # two jobs that make the tables at once break them
            tracker.start()
        settings = flatten(run["config"]).items()
        tracker.store_init_configuration({_NOT_IN_A_KEY.sub("_", k): str(v) for k, v in settings})
    except ModuleNotFoundError as error:
        raise ConfigError("logger=mlflow needs: pip install -e '.[mlflow]'") from error
    except Exception as error:  # of a database, a connection, MLflow
        log.warning("MLflow cannot be reached (%s) and gets nothing", first_line(error))
        return NO_LOGGER
    return _Tracked(tracker, lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"))
