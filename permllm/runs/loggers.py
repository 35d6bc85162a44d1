"""Where a run's numbers stream to while it works: Weights & Biases, MLflow, TensorBoard, or nowhere."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from permllm.config import RunConfig, flatten
from permllm.errors import ConfigError, first_line
from permllm.runs import sweep
from permllm.runs.files import write_text

log = logging.getLogger(__name__)

# In the run directory: the id of its W&B run.
WANDB_ID = ".wandb-id"
# Of what is typed for a job, what does not tell it from others: it names the sweep, or says nothing about the result.
_NOT_IN_A_NAME = ("experiment", "logger", "runs_dir", "run_dir", "force")
# Where a pass belongs, not what it found.
_WITHOUT_CHART = ("pass/pass", "pass/first_layer", "pass/last_layer")
# Of ours, and what W&B makes itself.
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# W&B refuses longer ones.
_LONGEST_NAME = 128
_LONGEST_TAG = 64


class RunLogger(Protocol):
    """A sink of numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one training step; steps count from 0 over all passes and windows."""

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        """Numbers of one pass, as in `history.jsonl`; passes count from 1 over all windows. What is None was not measured."""

    def summary(self, values: Mapping[str, Any], earlier: Iterable[str] = ()) -> None:
        """Final numbers, names joined by slashes; those of an earlier evaluation of the run hold no longer."""


class _Nowhere:
    def log(self, values: Mapping[str, float], step: int) -> None:
        pass

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        pass

    def summary(self, values: Mapping[str, Any], earlier: Iterable[str] = ()) -> None:
        pass


NO_LOGGER: RunLogger = _Nowhere()


class _WandB:
    def __init__(self, run: Any) -> None:
        self._run = run
        self._defined: set[str] = set()
        self._step = -1
        # The horizontal axes; no charts of their own.
        run.define_metric("lcp/step", hidden=True)
        run.define_metric("lcp/pass", hidden=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        self._row("lcp", values, "lcp/step", step, 2 * step)

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        measured = {key: value for key, value in values.items() if value is not None}
        self._row("pass", measured, "lcp/pass", number, 2 * self._step + 1)

    def summary(self, values: Mapping[str, Any], earlier: Iterable[str] = ()) -> None:
        for name in earlier:
            del self._run.summary[name]
        for name, value in values.items():
            if isinstance(value, int | float):
                self._run.define_metric(name, summary="last")
        self._run.summary.update(dict(values))

    def _row(self, prefix: str, values: Mapping[str, Any], axis: str, position: int, row: int) -> None:
        """Log one row.

        Its number follows from the step, not from what was logged before: a step that a continued run does again has the
        number that it had. A row below the last one is lost in W&B, with a warning, so it is not sent.
        """
        if row < self._run.starting_step:
            return
        named = {f"{prefix}/{key}": value for key, value in values.items()}
        self._define(named, axis)
        self._run.log({axis: position, **named}, step=row, commit=True)

    def _define(self, names: Iterable[str], axis: str) -> None:
        for name in names:
            if name not in self._defined:
                self._defined.add(name)
                summary = "min" if name.endswith("loss") else None
                self._run.define_metric(name, step_metric=axis, summary=summary, hidden=name in _WITHOUT_CHART)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"lcp/{key}", value, step)

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        for key, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"pass/{key}", value, number)

    def summary(self, values: Mapping[str, Any], earlier: Iterable[str] = ()) -> None:
        for key, value in values.items():  # what is in its files stays there
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value)


@contextmanager
def open_logger(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    """The logger that the group `logger` selects, closed at the end, also when the run fails."""
    mode = _wandb_mode() if config.logger.name in ("auto", "wandb") else None
    if config.logger.name == "wandb" or mode not in (None, "disabled"):
        with _open_wandb(config, directory, mode or "offline") as logger:
            yield logger
    elif config.logger.name == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'") from error
        folder = directory / "tensorboard"
        if config.force:  # curves of two runs in one folder are drawn as one
            shutil.rmtree(folder, ignore_errors=True)
        with SummaryWriter(str(folder)) as writer:
            writer.add_text("config", f"```\n{described(config)}\n```")
            yield _TensorBoard(writer)
    elif config.logger.name == "mlflow":
        from permllm.runs.mlflow_logger import open_mlflow

        tags = {key: value for key, value in _tags(config).items() if value} | {"run_directory": str(directory)}
        with open_mlflow(
            Path(config.runs_dir),
            directory,
            project=config.logger.project,
            name=job_name(directory),
            tags=tags | {"config_hash": config.hash, "job_type": _job_type(config)},
            settings=flatten(described(config)),
            force=config.force,
        ) as mlflow:
            yield mlflow or NO_LOGGER
    else:
        yield NO_LOGGER


def described(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run's results, so that a reader finds the identity in them."""
    return config.identity | {key: config.resolved[key] for key in ("permutation", "evaluation")}


def _tags(config: RunConfig) -> dict[str, str | None]:
    """What runs are found by."""
    methods = {group: getattr(config, group).get("name") for group in ("pruner", "permutation")}
    if "epochs" in config.mask:  # learned
        methods["mask"] = config.mask.get("name")
    return methods | {"sparsity": config.sparsity, "model": config.model.name, "group": job_group(config)}


def _job_type(config: RunConfig) -> str:
    return "learn" if "epochs" in config.permutation or "epochs" in config.mask else "prune"


def job_group(config: RunConfig) -> str | None:
    """The group of W&B, the tag `group` of MLflow: what was asked for, else the sweep that the job belongs to, else none."""
    group = config.logger.group or os.environ.get(sweep.VARIABLE)
    return group[:_LONGEST_NAME] if group else None


def job_name(directory: Path) -> str:
    """The name in W&B and MLflow: what was typed for the job and says what it is; without any, the run directory's name."""
    words = [word for word in sweep.overrides() if word.lstrip("+~").partition("=")[0].split(".")[0] not in _NOT_IN_A_NAME]
    return " ".join(words)[:_LONGEST_NAME] or directory.name


def _wandb_id(config: RunConfig, directory: Path) -> str:
    """The id that a continued run had before, so that its curves go on; a new one for a new run, and for force=true."""
    file = directory / WANDB_ID
    if file.is_file() and not config.force:
        known = file.read_bytes().decode("ascii", errors="replace").strip()
        if _ID.fullmatch(known):
            return known
        log.warning("%s holds no id of a W&B run: this run goes on in a new one", file)
    # Not the hash alone: a run that was deleted here and is run again is another one.
    run_id = f"{config.hash}-{secrets.token_hex(4)}"
    write_text(file, run_id + "\n")
    return run_id


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


@contextmanager
def _open_wandb(config: RunConfig, directory: Path, mode: str) -> Iterator[RunLogger]:
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    # All jobs of a sweep write below one folder, so that one `wandb sync` or `wandb leet` finds them.
    home = Path(config.paths.wandb_dir or os.environ.get("WANDB_DIR") or config.runs_dir)
    home.mkdir(parents=True, exist_ok=True)

    tags = _tags(config)
    group = tags.pop("group")
    run_id = _wandb_id(config, directory)

    def start(mode: str) -> Any:
        return wandb.init(
            project=config.logger.project,
            group=group,
            name=job_name(directory),
            tags=[str(tag)[:_LONGEST_TAG] for tag in tags.values() if tag],
            job_type=_job_type(config),
            config=described(config) | {"run_directory": str(directory), "config_hash": config.hash},
            id=run_id,
            # Offline, each attempt leaves a folder of its own with this id, and says in it that it resumes the run.
            # `wandb sync` sends the folders of one id as one run, in the order of their time.
            resume="allow",
            dir=str(home),
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
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
