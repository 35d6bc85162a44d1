"""Loggers of a run's numbers: Weights & Biases, MLflow, TensorBoard, or none."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
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
from permllm.runs.files import write_text
from permllm.runs.measures import flat_figures

log = logging.getLogger(__name__)

# In the run directory: the id of its W&B run, and the loggers that have its final numbers, a line
# each.
WANDB_ID, LOGGED = ".wandb-id", ".logged"
# Typed words that name the sweep, or say nothing about the result.
_NOT_IN_A_NAME = r"[+~]*(experiment|logger|runs_dir|run_dir|force)\b"
_LONGEST_NAME, _LONGEST_TAG = 128, 64  # of W&B
_NOT_IN_A_KEY = re.compile(r"[^\w./: -]")  # of MLflow
# MLflow sends nothing about its use, and a server that is down costs seconds.
_MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class RunLogger:
    """Sink of the numbers of one run; this one drops them."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one training step; steps count from 0 over all epochs and windows."""
        self._send("lcp", values, step)

    def log_epoch(self, values: Mapping[str, Any], number: int) -> None:
        """Log one line of `history.jsonl`; lines count from 1. None was not measured."""
        self._send(
            "epoch", {key: value for key, value in values.items() if value is not None}, number
        )

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

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _send(self, kind: str, values: Mapping[str, Any], number: Any) -> None:
        # A resumed run gives a step the row that it had before. W&B drops rows that it has already,
        # with a warning each.
        self._step = number if kind == "lcp" else self._step
        axis, row = (
            ("lcp/step", 2 * number)
            if kind == "lcp"
            else ("lcp/epoch", max(2 * self._step + 1, number))
        )
        if row >= self._run.starting_step:
            self._run.log(
                {axis: number} | {f"{kind}/{key}": value for key, value in values.items()},
                step=row,
                commit=True,
            )


class _Tracked(RunLogger):
    """A tracker of accelerate, which gets nothing more after its first failure: a server must not cost a run its result."""

    def __init__(self, tracker: Any, end: Callable[[bool], None]) -> None:
        self._tracker, self._end = tracker, end

    def close(self, failed: bool) -> None:
        with suppress(Exception):  # the server may be gone
            self._end(failed)

    def _send(self, kind: str, values: Mapping[str, Any], number: int | None) -> None:
        numbers = {
            f"{kind}/{key}".lstrip("/"): value
            for key, value in values.items()
            if isinstance(value, int | float)
        }
        try:
            if self._tracker is not None:
                self._tracker.log(
                    {_NOT_IN_A_KEY.sub("_", key): value for key, value in numbers.items()}, number
                )
        except Exception as error:  # of a database, a connection, a disk
            log.warning(
                "the logger fails (%s) and gets nothing more of this run", first_line(error)
            )
            self._tracker = None


@contextmanager
def open_logger(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    """Open the logger that the group `logger` selects, and close it at the end, also when the run fails."""
    if config.force:
        (directory / LOGGED).unlink(missing_ok=True)
    openers = {
        "auto": _open_wandb,
        "wandb": _open_wandb,
        "mlflow": _open_mlflow,
        "tensorboard": _open_tensorboard,
    }
    logger = (
        NO_LOGGER
        if config.logger.name == "none"
        else openers[config.logger.name](config, directory)
    )
    failed = True
    try:
        yield logger
        failed = False
    finally:
        logger.close(failed)
    if logger is not NO_LOGGER:
        names = dict.fromkeys([*_logged(directory), config.logger.name.replace("auto", "wandb")])
        write_text(directory / LOGGED, "".join(f"{name}\n" for name in names))


def log_finished(
    config: RunConfig, directory: Path, metrics: dict[str, Any], history: list[dict[str, Any]]
) -> None:
    """Log a finished run, without its single steps, where the logger that is asked for does not have it yet."""
    if config.logger.name.replace("auto", "wandb") in _logged(directory):
        return
    with open_logger(config, directory) as logger:
        for number, values in enumerate(history, 1):
            logger.log_epoch(values, number)
        logger.summary(flat_figures(metrics))
    if logger is not NO_LOGGER:
        log.info(
            "%s was finished before: the logger has its epochs and final numbers, and not its single steps",
            directory,
        )


def _logged(directory: Path) -> list[str]:
    """Return the loggers that have the run's final numbers."""
    file = directory / LOGGED
    return file.read_text(encoding="utf-8").split() if file.is_file() else []


def described(config: RunConfig, directory: Path) -> dict[str, Any]:
    """Return the name of a run in W&B and MLflow, its group, kind of job, tags and settings."""
    words = [word for word in sweep.overrides() if not re.match(_NOT_IN_A_NAME, word)]
    methods = {"pruner": config.pruner, "permutation": config.permutation, "mask": config.mask}
    tags = {
        group: str(method.get("name"))
        for group, method in methods.items()
        if group != "mask" or "epochs" in method
    }
    return {
        "name": " ".join(words)[:_LONGEST_NAME] or directory.name,
        "group": (config.logger.group or os.environ.get(sweep.VARIABLE) or "")[:_LONGEST_NAME]
        or None,
        "job_type": "learn" if "epochs" in {**config.permutation, **config.mask} else "prune",
        "tags": tags | {"sparsity": config.sparsity, "model": config.model.name},
        "config": config.identity
        | {key: config.resolved[key] for key in ("permutation", "evaluation")},
        "where": {"run_directory": str(directory), "config_hash": config.hash},
    }


def _open_wandb(config: RunConfig, directory: Path) -> RunLogger:
    """Open a run of W&B: as `WANDB_MODE` says, else online with a key; without one offline, or none where auto asks."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else None)
    except (wandb.errors.Error, OSError):  # the key cannot be verified
        mode = "offline"
    if config.logger.name == "auto" and mode in (None, "disabled"):
        return NO_LOGGER
    # All jobs of a sweep write below one folder, so that one `wandb sync` or `wandb leet` finds
    # them.
    home = Path(config.paths.wandb_dir or os.environ.get("WANDB_DIR") or config.runs_dir)
    home.mkdir(parents=True, exist_ok=True)
    # Offline, each attempt leaves a folder with this id; `wandb sync` sends them as one run, in the
    # order of time.
    told = described(config, directory)
    run: dict[str, Any] = {
        **{key: told[key] for key in ("name", "group", "job_type")},
        "id": _wandb_id(config, directory),
        "resume": "allow",
        "dir": str(home),
        "project": config.logger.project,
        "tags": [tag[:_LONGEST_TAG] for tag in told["tags"].values()],
        "config": told["config"] | told["where"],
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        return _WandB(wandb.init(mode=mode or "offline", **run))  # type: ignore[arg-type]
    except wandb.errors.Error as error:  # `wandb sync` can send the run later
        log.warning("W&B cannot be reached (%s): this run is kept offline", first_line(error))
        return _WandB(wandb.init(mode="offline", **run))


def _wandb_id(config: RunConfig, directory: Path) -> str:
    """Return the id that a resumed run had before; a new one for a new run, and for force=true."""
    file = directory / WANDB_ID
    if config.force or not file.is_file():
        write_text(file, f"{config.hash}-{secrets.token_hex(4)}\n")
    return file.read_text(encoding="ascii").strip()


def _open_tensorboard(config: RunConfig, directory: Path) -> RunLogger:
    if config.force:  # TensorBoard draws the curves of two runs in one folder as one
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
    PartialState(cpu=True)  # which accelerate's trackers ask whether this is rank 0
    tracker = TensorBoardTracker("tensorboard", logging_dir=directory)
    try:
        tracker.start()
    except ImportError as error:
        raise ConfigError(
            "logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'"
        ) from error
    tracker.log({"config": f"```\n{described(config, directory)['config']}\n```"})
    return _Tracked(tracker, lambda failed: tracker.finish())


def _open_mlflow(config: RunConfig, directory: Path) -> RunLogger:
    """Open a run of MLflow: in a database in the runs folder, or in the store that `MLFLOW_TRACKING_URI` names."""
    os.environ.update(_MLFLOW | dict(os.environ))
    home, run = Path(config.runs_dir).resolve(), described(config, directory)
    home.mkdir(parents=True, exist_ok=True)
    tags = run["tags"] | run["where"] | {"group": run["group"] or "", "job_type": run["job_type"]}
    try:
        import mlflow

        for part in ("mlflow", "alembic"):
            logging.getLogger(part).setLevel(
                logging.WARNING
            )  # the tables that they make are no news
        mlflow.set_tracking_uri(
            os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
        )
        PartialState(cpu=True)
        # Nothing is kept in the folder, but without one MLflow makes it where the command runs.
        tracker = MLflowTracker(
            config.logger.project, (home / "mlartifacts").as_uri(), tags=tags, run_name=run["name"]
        )
        with FileLock(
            home / ".mlflow.db.lock"
        ):  # two jobs of a sweep that make the tables at once break them
            tracker.start()
        tracker.store_init_configuration(
            {_NOT_IN_A_KEY.sub("_", k): str(v) for k, v in flatten(run["config"]).items()}
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "logger=mlflow needs mlflow-skinny, sqlalchemy and alembic: pip install -e '.[mlflow]'"
        ) from error
    except Exception as error:  # of a database, a connection, MLflow
        log.warning(
            "MLflow cannot be reached (%s): this run is in its run directory alone",
            first_line(error),
        )
        return NO_LOGGER
    return _Tracked(tracker, lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"))
