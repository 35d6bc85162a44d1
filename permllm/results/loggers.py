"""Where a run's numbers stream to while it works: Weights & Biases, TensorBoard, or nowhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from permllm.config import RunConfig
from permllm.errors import ConfigError

log = logging.getLogger(__name__)


class RunLogger(Protocol):
    """A sink of numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one training step."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers, names joined by slashes."""


class _Nowhere:
    def log(self, values: Mapping[str, float], step: int) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass


class _WandB:
    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("lcp/step")
        run.define_metric("lcp/*", step_metric="lcp/step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"lcp/step": step, **{f"lcp/{key}": value for key, value in values.items()}})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"lcp/{key}", value, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value)


@contextmanager
def open_logger(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    """The logger that the group `logger` selects, closed at the end, also when the run fails."""
    if config.logger.name == "wandb":
        with _open_wandb(config, directory) as logger:
            yield logger
    elif config.logger.name == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("logger=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'") from error
        with SummaryWriter(str(directory / "tensorboard")) as writer:
            writer.add_text("config", f"```\n{config.identity()}\n```")
            yield _TensorBoard(writer)
    else:
        yield _Nowhere()


def _wandb_key() -> bool:
    """Whether credentials are there; asks nobody, and a key that the server refuses counts as none."""
    import wandb

    try:
        return wandb.login(prompt=False)
    except (wandb.errors.Error, OSError):
        return False


@contextmanager
def _open_wandb(config: RunConfig, directory: Path) -> Iterator[RunLogger]:
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
    # All jobs of a sweep write below one folder, so that one `wandb sync` or `wandb leet` finds them.
    home = Path(os.environ.get("WANDB_DIR") or config.runs_dir)
    home.mkdir(parents=True, exist_ok=True)

    def start(mode: str) -> Any:
        return wandb.init(
            project=config.logger.project,
            group=config.logger.group,
            name=directory.name,
            config=config.identity(),
            dir=str(home),
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
        )

    try:
        run = start(mode)
    except wandb.errors.Error as error:
        # A server that is down or refuses must not cost a run its result; `wandb sync` can send it later.
        log.warning("W&B cannot be reached (%s): this run is kept offline", str(error).splitlines()[0])
        run = start("offline")
    failed = True
    try:
        yield _WandB(run)
        failed = False
    finally:
        run.finish(exit_code=int(failed))
