"""The training loop over one window of decoder layers: its steps and epochs, whatever learns in it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from permllm.errors import TrainingError
from permllm.runtime import parallel
from permllm.runtime.memory import peak_memory
from permllm.training.checkpoint import Checkpoint
from permllm.training.learner import Learner, Moment, Window
from permllm.training.objective import Objective
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

log = logging.getLogger(__name__)


class Training:
    """One run of the optimisation over a window.

    Args:
        settings: of the descent.
        problem: the model, whose linears in the window are masked linears now or hold the weights
            that learn, and the samples.
        window: the layers.
        learner: what learns.
        name: of the method, for a person.
        file: of the checkpoint in the problem's directory.
        history: entries of the epochs before, of all windows; those of this window are appended.
    """

    def __init__(
        self,
        settings: LearningSettings,
        problem: LearningProblem,
        window: Window,
        learner: Learner,
        name: str,
        file: str,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.window = window
        self.learner = learner
        self.name = name
        self.device = problem.device
        # Fused: no temporaries of the size of all parameters.
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            learner.parameters(), weight_decay=settings.weight_decay, fused=fused
        )
        # In float16 the gradients of a mean over tokens would vanish. A step whose gradients
        # overflow is left out.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=next(problem.model.parameters()).dtype == torch.float16
        )
        self.count = settings.samples_of(len(problem.tokens))
        self.steps_an_epoch = math.ceil(self.count / settings.batch_size)
        self.steps = settings.steps_for(self.count)
        self.epochs = math.ceil(self.steps / self.steps_an_epoch)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)
        self.done = 0  # steps
        self.best_loss = math.inf
        self.history = [] if history is None else history
        self.objective = Objective(
            settings, problem, window, learner, self.steps, self.optimizer, self.scaler
        )
        self.checkpoint = Checkpoint(problem, file)
        self._losses: list[float] = []  # of the steps of the present epoch

    def run(self) -> None:
        """All epochs that are left; the learner knows the best."""
        label = f"{self.name}, layers {self.window.first} to {self.window.stop - 1}"
        with tqdm(total=self.steps, initial=self.done, desc=label, unit="step") as progress:
            while self.done < self.steps:
                epoch = self.done // self.steps_an_epoch
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
                    told = {"loss": loss} | values
                    self.problem.on_step(
                        self.window.number * self.steps + moment.step,
                        told | {"seconds": seconds[-1]},
                    )
                    progress.update()
                    progress.set_postfix({key: f"{value:.4f}" for key, value in told.items()})
                    if self.checkpoint.due and after is not None:
                        self.checkpoint.save(self._state())
                self._end_of_epoch(moment, batches, math.fsum(seconds) / len(seconds))

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Return the samples of each step of an epoch: epoch e takes the (e+1)-th permutation of one generator."""
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        for _ in range(epoch + 1):
            samples = torch.randperm(self.count, generator=generator)
        return samples.split(self.settings.batch_size)[: self.steps - epoch * self.steps_an_epoch]

    def step(
        self, batch: Tensor, moment: Moment, after: Tensor | None = None
    ) -> tuple[float, dict[str, float]]:
        """One update from the samples at the indices `batch`.

        The host waits for the device for what orders learn from, and for the loss when backward is
        on its way (and where the model itself looks at its mask). Each rank computes its portions
        of the batch, and all make the same update.

        Args:
            batch: int64 `(samples,)`.
            moment: of the step.
            after: the next batch, to be fetched while the device works on this one; None where
                there is none.

        Returns:
            The loss before the update, and what the learner tells of the step.

        Raises:
            TrainingError: the loss is not finite; nothing is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(moment)
        total = self.objective.backward(batch, moment, after)
        parallel.all_reduce([total])
        counted = self.learner.flips()
        # One transfer for both.
        value, *flips = torch.stack(
            [total.double(), *([] if counted is None else [counted.double()])]
        ).tolist()
        if not math.isfinite(value):
            raise TrainingError(self._failure(moment, self.objective.broken(batch)))
        learning = (
            parameter for group in self.learner.parameters() for parameter in group["params"]
        )
        parallel.all_reduce(parameter.grad for parameter in learning if parameter.grad is not None)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return value, self.learner.step_values(moment, flips[0] if flips else None)

    def _begin(self, moment: Moment) -> None:
        try:
            self.learner.begin(moment)
        except ValueError as error:
            raise TrainingError(self._failure(moment, str(error))) from error

    def _end_of_epoch(self, moment: Moment, batches: Sequence[Tensor], step_seconds: float) -> None:
        measured = None
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(moment)
        if moment.epoch >= self.epochs - self.settings.select_from:
            measured = self.objective.mean(self.count)
            if not math.isfinite(measured):
                raise TrainingError(
                    self._failure(moment, self.objective.broken(torch.arange(self.count)))
                )
        # What was not measured is better than nothing, but not than what was.
        if not math.isfinite(self.best_loss) if measured is None else measured < self.best_loss:
            self.learner.keep()
        if measured is not None:
            self.best_loss = min(self.best_loss, measured)
        sizes = [len(batch) for batch in batches]  # the last step may have fewer samples
        values: dict[str, Any] = {
            "epoch": moment.epoch + 1,
            "first_layer": self.window.first,
            "last_layer": self.window.stop - 1,
            "loss": math.fsum(loss * size for loss, size in zip(self._losses, sizes, strict=True))
            / sum(sizes),
            "measured_loss": measured,
        }
        values |= self.learner.epoch_values(moment)
        values |= {"step_seconds": step_seconds, "peak_memory_bytes": peak_memory(self.device)}
        self.history.append(values)
        self._losses = []
        self.checkpoint.save(self._state())
        self.problem.on_epoch(values)

    def _failure(self, moment: Moment, reason: str) -> str:
        text = f"{self.name.upper()} stopped in epoch {moment.epoch + 1}: {reason}"
        directory = self.problem.directory
        if directory:
            text += self.learner.write_best(directory)
        return text

    def _state(self) -> dict[str, Any]:
        return {
            "window": self.window.number,
            "step": self.done,
            "losses": self._losses,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best_loss": self.best_loss,
            "learner": self.learner.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same window (see `read_checkpoint`)."""
        self.learner.restore(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.done, self.best_loss, self._losses = (
            state["step"],
            state["best_loss"],
            list(state["losses"]),
        )
        log.info("continuing after step %d of %d", self.done, self.steps)
