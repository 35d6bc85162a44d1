"""Loggers of a run: its file `run.log`, and Weights & Biases or TensorBoard."""

import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from permllm.errors import ConfigError, first_line, one_line
from permllm.settings.composition import SWEEP_VARIABLE
from permllm.settings.config import METHOD_GROUPS, NEUTRAL_OPTIONS, RunConfig
from permllm.settings.values import flatten
from permllm.store import sweep
from permllm.store.directory import run_log
from permllm.store.environment import command_line
from permllm.store.files import RECORD, TENSORBOARD, WANDB_ID, write_text

log = logging.getLogger(__name__)

# Overrides that name the sweep, or do not concern the result.
_NOT_IN_A_NAME = r"[+~]*(experiment|logger|runs_dir|run_dir|force)\b"
_EPOCH = "epoch/"  # prefix of the metrics of an epoch
# Numbers of an epoch that make no curve.
_NO_CURVES = {"epoch", "round", "first_layer", "last_layer"}
# Settings that a person seldom looks at.
_BOOKKEEPING = re.compile(r"model\.architecture\.|.*(_target_$|digest)")
# Limits of W&B.
_LONGEST_NAME = 128
_LONGEST_TAG = 64


@contextmanager
def job_log(file: Path) -> Iterator[None]:
    """Append the command, all messages, and the error of a job that fails to a file."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # On a full disk the record raises the error that the user sees.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    loggers = (logging.getLogger(), run_log)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        run_log.info("command: %s", command_line())
        yield
        run_log.info("finished")
    except BaseException as error:
        run_log.error("ended: %s", one_line(error))
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


class RunLogger:
    """Logger of one run. This base class drops all numbers."""

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Log one training step of a method as `GROUP/NAME`.

        The steps count from 0 over all methods, stages of layers and epochs.
        """
        self._send(f"{group}/", values, step)

    def log_epoch(self, line: Mapping[str, Any], number: int) -> None:
        """Log one line of `history.jsonl`, with its number from 1, as `epoch/GROUP/NAME`.

        The line has the group of the method, and metrics; None is a metric without value.
        """
        measured = {
            key: value for key, value in line.items() if value is not None and key not in _NO_CURVES
        }
        group = measured.pop("group")
        self._send(f"{_EPOCH}{group}/", measured, number)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log the final numbers, with slashes in their names."""
        self._send("", values, None)

    def close(self, failed: bool) -> None:
        """End the run in the logger, as failed or finished."""

    def _send(self, prefix: str, values: Mapping[str, Any], number: int | None) -> None:
        """Log values with a prefix for their names; `number` is the step or the line."""


NO_LOGGER = RunLogger()


class _WandB(RunLogger):
    """Run of Weights & Biases, with a row for each step, which also has the epoch that it ends."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._row = run.starting_step

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _send(self, prefix: str, values: Mapping[str, Any], number: int | None) -> None:
        if number is None:
            self._run.summary.update(dict(values))
            return
        ends_row = prefix.startswith(_EPOCH)
        if not ends_row:
            self._row = number
        # A resumed run repeats steps. W&B has their rows and would warn about each of them.
        if self._row >= self._run.starting_step:
            named = {f"{prefix}{key}": value for key, value in values.items()}
            self._run.log(named, step=self._row, commit=ends_row)


class _TensorBoard(RunLogger):
    """Curves in TensorBoard, and the settings with the final numbers.

    After the first failure, of a disk for example, it logs nothing.
    """

    def __init__(self, writer: Any, settings: dict[str, Any]) -> None:
        self._writer = writer
        self._settings = settings

    def close(self, failed: bool) -> None:
        with suppress(Exception):
            self._writer.close()

    def _send(self, prefix: str, values: Mapping[str, Any], number: int | None) -> None:
        if self._writer is None:
            return
        numbers = {
            f"{prefix}{key}": value
            for key, value in values.items()
            if isinstance(value, int | float) and not key.startswith(RECORD)
        }
        try:
            if number is None:
                self._writer.add_hparams(self._settings, numbers, run_name=".")
            else:
                for name, value in numbers.items():
                    self._writer.add_scalar(name, value, number)
            self._writer.flush()
        except Exception as error:
            self._writer = None
            log.warning("the logger fails (%s): nothing more is logged", first_line(error))


@contextmanager
def open_logger(config: RunConfig, directory: Path, learns: bool) -> Iterator[RunLogger]:
    """Open the logger of the group `logger`, and close it at the end, also if the run fails.

    `learns` tells if a method of the run trains.
    """
    logger = NO_LOGGER
    if config.logger.name != "none":
        run = described(config, directory, learns)
        opener = _open_tensorboard if config.logger.name == "tensorboard" else _open_wandb
        logger = opener(config, directory, run)
    failed = True
    try:
        yield logger
        failed = False
    finally:
        logger.close(failed)


def described(config: RunConfig, directory: Path, learns: bool) -> dict[str, Any]:
    """Return a run's name in W&B, its group, type of job, tags and settings."""
    words = [word for word in sweep.overrides() if not re.match(_NOT_IN_A_NAME, word)]
    names = {group: getattr(config, group)["name"] for group in METHOD_GROUPS}
    tags = {group: name for group, name in names.items() if name != NEUTRAL_OPTIONS.get(group)}
    evaluated = {key: config.resolved[key] for key in ("permutation", "evaluation")}
    settings = {
        f"{RECORD}.{key}" if value is None or _BOOKKEEPING.match(key) else key: value
        for key, value in flatten(config.identity | evaluated).items()
    }
    place = {"run_directory": str(directory), "config_hash": config.hash}
    return {
        "name": " ".join(words)[:_LONGEST_NAME] or directory.name,
        "group": config.logger.group or os.environ.get(SWEEP_VARIABLE),
        "job_type": "learn" if learns else "prune",
        "tags": tags | {"sparsity": config.sparsity, "model": config.model.name},
        "config": settings | {f"{RECORD}.{key}": value for key, value in place.items()},
    }


def _open_wandb(config: RunConfig, directory: Path, run: dict[str, Any]) -> RunLogger:
    """Open a run of W&B in the mode of `WANDB_MODE`, or else online.

    Without a key the run is offline. With `logger=auto` there is no run then.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else None)
    except (wandb.errors.Error, OSError):  # W&B cannot check the key
        mode = "offline"
    if config.logger.name == "auto" and mode in (None, "disabled"):
        return NO_LOGGER
    # All jobs of a sweep write to one folder, so that one `wandb sync` finds them.
    home = Path(os.environ.get("WANDB_DIR") or config.runs_dir)
    home.mkdir(parents=True, exist_ok=True)
    # Offline, each attempt leaves a folder with the same id. `wandb sync` sends them as one run.
    file = directory / WANDB_ID
    if not file.is_file():
        write_text(file, f"{config.hash}-{secrets.token_hex(4)}\n")
    start: Any = partial(
        wandb.init,
        name=run["name"],
        group=run["group"],
        job_type=run["job_type"],
        id=file.read_text().strip(),
        resume="allow",
        dir=str(home),
        project=config.logger.project,
        config=run["config"],
        tags=[tag[:_LONGEST_TAG] for tag in run["tags"].values()],
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        return _WandB(start(mode=mode or "offline"))
    except wandb.errors.Error as error:  # `wandb sync` can send the run later
        log.warning("W&B cannot be reached (%s): this run is kept offline", first_line(error))
        return _WandB(start(mode="offline"))


def _open_tensorboard(config: RunConfig, directory: Path, run: dict[str, Any]) -> RunLogger:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("logger=tensorboard needs: pip install -e '.[tensorboard]'") from error
    settings = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in run["config"].items()
    }
    return _TensorBoard(SummaryWriter(directory / TENSORBOARD), settings)
