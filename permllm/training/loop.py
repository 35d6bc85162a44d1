"""Training loop of one stage, for any learner, with its checkpoint."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from permllm.errors import DataError, TrainingError
from permllm.runtime import parallel
from permllm.runtime.memory import peak_memory
from permllm.runtime.signals import raise_if_interrupted
from permllm.store.tensors import load_state, save_state
from permllm.training.learner import Learner, Moment, Stage
from permllm.training.objective import Objective
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

log = logging.getLogger(__name__)

# Least seconds between checkpoints within an epoch; the same as a multiple of the time of writing.
_EVERY = 120.0
_TIMES_WRITING = 50.0
# Work of a step in forwards of its windows: a forward, and a backward that takes twice as long.
_STEP = 3
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left, {elapsed} gone{postfix}"


class Training(Objective):
    """Gradient descent on the loss of a stage.

    Args:
        settings, problem, stage, learner: as in `Objective`.
        name: name of the method, for messages.
        file: name of the checkpoint in the problem's directory.
        history: entries of all past epochs, of earlier stages too; each new epoch is appended.
    """

    def __init__(
        self,
        settings: LearningSettings,
        problem: LearningProblem,
        stage: Stage,
        learner: Learner,
        name: str,
        file: str,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(settings, problem, stage, learner)
        self.name = name
        self.steps_an_epoch = math.ceil(self.count / settings.batch_size)
        self.epochs = math.ceil(self.steps / self.steps_an_epoch)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)
        self.done = 0  # number of steps
        self.best_loss = math.inf
        self.history = [] if history is None else history
        self._losses: list[float] = []  # of the steps in the present epoch
        self._file = file
        self._next_checkpoint = time.perf_counter() + _EVERY

    def run(self) -> None:
        """Train all epochs that are left; the learner has kept the best result."""
        label = f"{self.name}, layers {self.stage.layers[0]} to {self.stage.layers[-1]}"
        done = self._work(self.done)
        total = self._work(self.steps)
        with tqdm(desc=label, initial=done, total=total, bar_format=_BAR) as progress:
            while self.done < self.steps:
                self._epoch(self.done // self.steps_an_epoch, progress)

    def _work(self, steps: int) -> int:
        """Return the work of the first steps, with the measurements after their epochs."""
        epochs = self.epochs if steps == self.steps else steps // self.steps_an_epoch
        measured = max(0, epochs - max(0, self.epochs - self.settings.select_from))
        return _STEP * steps + measured * self.steps_an_epoch

    def _epoch(self, epoch: int, progress: "tqdm[Any]") -> None:
        """Train the steps of an epoch that are left, and finish the epoch."""
        batches = self._batches(epoch)
        if not self._losses:
            self.learner.begin_epoch()
        seconds = []
        for position in range(len(self._losses), len(batches)):
            started = time.perf_counter()
            moment = Moment(self.done, self.steps, epoch, self.epochs)
            after = batches[position + 1] if position + 1 < len(batches) else None
            loss, values = self.step(batches[position], moment, after)
            seconds.append(time.perf_counter() - started)
            self._losses.append(loss)
            self.done += 1
            measures = {"loss": loss} | values
            number = self.stage.number * self.steps + moment.step
            self.problem.on_step(number, measures | {"seconds": seconds[-1]})
            shown = {key: f"{value:.4f}" for key, value in measures.items()}
            progress.set_postfix({"step": f"{self.done}/{self.steps}"} | shown, refresh=False)
            progress.update(_STEP)
            raise_if_interrupted()
            if after is not None and time.perf_counter() > self._next_checkpoint:
                self._save()
        self._end_of_epoch(moment, batches, math.fsum(seconds) / len(seconds))
        progress.update(self._work(self.done) - progress.n)

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Return the indices of the windows in each step of an epoch.

        Epoch e takes the (e+1)-th permutation that one generator draws.
        """
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        for _ in range(epoch + 1):
            windows = torch.randperm(self.count, generator=generator)
        return windows.split(self.settings.batch_size)[: self.steps - epoch * self.steps_an_epoch]

    def step(
        self, batch: Tensor, moment: Moment, after: Tensor | None = None
    ) -> tuple[float, dict[str, float]]:
        """Make one update.

        The host waits for the device twice: when the learner begins, and for the loss after
        backward is launched. Each rank computes its portions of the batch; all ranks make the same
        update.

        Args:
            batch: int64 `(windows,)`, indices of the windows.
            moment: progress of the training.
            after: the next batch, which is fetched while the device computes; None: no next batch.

        Returns:
            The loss before the update, and the learner's measures of the step.

        Raises:
            TrainingError: the loss is not finite; nothing is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(moment)
        total = self.backward(batch, after)
        parallel.all_reduce([total])
        flips = self.learner.flips()
        # One transfer from the device for both.
        figures = [total] if flips is None else [total, flips]
        loss, *moved = torch.stack([figure.double() for figure in figures]).tolist()
        if not math.isfinite(loss):
            raise self._failure(moment, self.broken(batch))
        learning = self.learner.parameters()
        parallel.all_reduce(values.grad for values in learning if values.grad is not None)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss, self.learner.step_values(moment, *moved)

    def _begin(self, moment: Moment) -> None:
        try:
            self.learner.begin(moment)
        except ValueError as error:
            raise self._failure(moment, str(error)) from error

    def _end_of_epoch(self, moment: Moment, batches: Sequence[Tensor], step_seconds: float) -> None:
        measured = None
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(moment)
        if moment.epoch >= self.epochs - self.settings.select_from:
            measured = self.mean()
            if not math.isfinite(measured):
                raise self._failure(moment, self.broken(torch.arange(self.count)))
            if measured < self.best_loss:
                self.best_loss = measured
                self.learner.keep()
        elif math.isinf(self.best_loss):  # no epoch was measured yet
            self.learner.keep()
        sizes = [len(batch) for batch in batches]  # the last step may have fewer windows
        weighted = (loss * size for loss, size in zip(self._losses, sizes, strict=True))
        values: dict[str, Any] = {
            "epoch": moment.epoch + 1,
            "first_layer": self.stage.layers[0],
            "last_layer": self.stage.layers[-1],
            "loss": math.fsum(weighted) / sum(sizes),
            "measured_loss": measured,
            **self.learner.epoch_values(moment),
            "step_seconds": step_seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        self.history.append(values)
        self._losses = []
        self._save()
        self.problem.on_epoch(values)

    def _failure(self, moment: Moment, reason: str) -> TrainingError:
        return TrainingError(f"{self.name.upper()} stopped in epoch {moment.epoch + 1}: {reason}")

    def _save(self) -> None:
        """Replace the checkpoint, on rank 0."""
        if self.problem.directory is None or parallel.rank():
            return
        started = time.perf_counter()
        state = {
            "stage": self.stage.number,
            "step": self.done,
            "losses": self._losses,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_loss": self.best_loss,
            "learner": self.learner.state(),
        }
        save_state(self.problem.directory / self._file, state)
        now = time.perf_counter()
        self._next_checkpoint = now + max(_EVERY, _TIMES_WRITING * (now - started))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same stage (see `read_checkpoint`)."""
        self.learner.restore(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.done = state["step"]
        self.best_loss = state["best_loss"]
        self._losses = list(state["losses"])
        log.info("continuing after step %d of %d", self.done, self.steps)


def read_checkpoint(problem: LearningProblem, file: str) -> dict[str, Any] | None:
    """Read the checkpoint that an interrupted run has left.

    Returns:
        The state; None: there is no checkpoint, or it cannot be read, so that learning starts over.
    """

    def read() -> dict[str, Any] | None:
        path = problem.directory / file if problem.directory else None
        if path is None or not path.is_file():
            return None
        try:
            state = load_state(path, problem.device)
            if "stage" not in state:
                raise DataError(f"{path} is of another version of PermLLM")
            return state
        except DataError as error:
            log.warning("%s: learning starts over", error)
            return None

    return parallel.on_main(read)
