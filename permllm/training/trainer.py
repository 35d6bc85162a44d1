"""Gradient descent in one stage after the other, for any learner, with its checkpoint."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from permllm.errors import DataError, TrainingError
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.models.offload import masked, placement_of
from permllm.runtime import parallel
from permllm.runtime.memory import peak_memory
from permllm.runtime.signals import raise_if_interrupted
from permllm.settings.learning import LearningSettings
from permllm.store.tensors import load_state, save_state
from permllm.training.learner import Learner, Progress, Stage
from permllm.training.objective import Objective
from permllm.training.problem import LearningProblem

log = logging.getLogger(__name__)

MaskOf: TypeAlias = Callable[[ChannelGroup, str], Tensor]
"""Function of a group and a linear's path; returns its mask, bool `(C_out, C_in)`, unpermuted."""

# Least seconds between checkpoints within an epoch; the same as a multiple of the time of writing.
CHECKPOINT_SECONDS = 120.0
CHECKPOINT_TIMES_WRITING = 50.0


class StageSchedule:
    """Sequence of the stages of a method that learns, from its checkpoint on.

    Args:
        problem: problem of the method. Its `on_resume` gets the history of the past epochs.
        name: name of the method, for messages.
        file: name of the checkpoint in the problem's directory.

    Attributes:
        state: the checkpoint to continue from; None: there is none, or a stage has loaded it.
    """

    def __init__(
        self, settings: LearningSettings, problem: LearningProblem, name: str, file: str
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.name = name
        self.file = file
        self.state = read_checkpoint(problem, file)
        past = self.state or {"stage": 0, "history": []}
        self._first = past["stage"]
        self._history = list(past["history"])
        problem.on_resume(list(self._history))

    def stages(self, learns: Callable[[range], bool], mask_of: MaskOf) -> Iterator[Stage]:
        """Yield the stages that are not trained yet.

        If all layers learn together, no layer runs here.

        Args:
            learns: tells whether decoder layers have parameters that learn.
            mask_of: returns the mask of each linear before the stage, at the time of the stage.
        """
        problem = self.problem
        layers = len(decoder_layers(problem.model))
        pruned = LayerOutputs(problem, mask_of)
        dense = LayerOutputs(problem)
        for number, span in enumerate(self.settings.spans(layers)):
            if number >= self._first and learns(span):
                inputs = pruned.after(span.start) if span.start else None
                target = problem.target if span.stop == layers else dense.after(span.stop)
                yield Stage(number, span, inputs, target)

    def train(self, stage: Stage, learner: Learner) -> None:
        """Train the learner of a stage. Raise TrainingError if the loss is not finite."""
        objective = Objective(self.settings, self.problem, stage, learner)
        trainer = Trainer(objective, self.name, self.file, self._history)
        if self.state is not None:
            trainer.restore(self.state)
            self.state = None  # frees as much memory as the parameters take
        trainer.run()


class LayerOutputs:
    """Outputs of the decoder layers, which run when they are asked for.

    Args:
        mask_of: returns the mask of each linear; None: the layers are dense.
    """

    def __init__(self, problem: LearningProblem, mask_of: MaskOf | None = None) -> None:
        self._problem = problem
        self._mask_of = mask_of
        self._stream: LayerStream | None = None
        self._layers = 0  # number of layers that the stream has passed

    def after(self, layers: int) -> Tensor:
        """Return the output of layer `layers - 1`, `(windows, tokens, hidden)` on the host.

        No call may ask for fewer layers than the last one.
        """
        problem = self._problem
        if self._stream is None:
            self._stream = LayerStream(
                problem.model, problem.tokens, problem.calibration_batch_size
            )
        for index in range(self._layers, layers):
            with masked_layer(problem, index, self._mask_of):
                self._stream.advance(index)
        self._layers = layers
        return self._stream.states()


@contextmanager
def masked_layer(problem: LearningProblem, index: int, mask_of: MaskOf | None) -> Iterator[None]:
    """Enter a decoder layer, and mask its weights inside the context unless `mask_of` is None."""
    with placement_of(problem.model).layer(index), ExitStack() as dense_again:
        for group in problem.groups:
            if group.layer == index and mask_of is not None:
                for path in group.members:
                    weight = linear_at(problem.model, path).weight
                    dense_again.callback(setattr, weight, "data", weight.data)
                    weight.data = masked(mask_of(group, path), weight.data)
        yield


class Trainer:
    """Training loop of a stage.

    Args:
        objective: loss of the stage, with its learner.
        name, file: as of `StageSchedule`.
        history: entries of all past epochs, of earlier stages too; each new epoch is appended.
    """

    def __init__(
        self,
        objective: Objective,
        name: str,
        file: str,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        self.objective = objective
        self.settings = objective.settings
        self.problem = objective.problem
        self.stage = objective.stage
        self.learner = objective.learner
        self.name = name
        self.windows = len(self.problem.tokens)
        self.steps = self.settings.steps_for(self.windows)
        self.steps_an_epoch = math.ceil(self.windows / self.settings.batch_size)
        self.epochs = math.ceil(self.steps / self.steps_an_epoch)
        # The fused optimizer has no temporaries of the size of all parameters.
        self.optimizer = torch.optim.AdamW(
            self.learner.parameters(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            betas=self.settings.betas,
            eps=self.settings.eps,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer,
            self.steps,
            eta_min=self.settings.last_rate * self.settings.learning_rate,
        )
        self.done = 0  # number of steps
        self.best_loss = math.inf
        self.history = [] if history is None else history
        self._losses: list[float] = []  # of the steps in the present epoch
        self._file = file
        self._next_checkpoint = time.perf_counter() + CHECKPOINT_SECONDS

    def run(self) -> None:
        """Train all epochs that are not trained yet; the learner has kept the best result."""
        label = f"{self.name}, layers {self.stage.layers[0]} to {self.stage.layers[-1]}"
        with tqdm(desc=label, initial=self.done, total=self.steps, unit="step") as bar:
            while self.done < self.steps:
                self._epoch(self.done // self.steps_an_epoch, bar)

    def _epoch(self, epoch: int, bar: "tqdm[Any]") -> None:
        """Train the steps of an epoch that are not trained yet, and finish the epoch."""
        batches = self._batches(epoch)
        seconds = []
        for batch in batches[len(self._losses) :]:
            started = time.perf_counter()
            progress = Progress(self.done, self.steps, epoch, self.epochs)
            values = self.step(batch, progress)
            seconds.append(time.perf_counter() - started)
            self._losses.append(values["loss"])
            self.done += 1
            number = self.stage.number * self.steps + progress.step
            self.problem.on_step(number, values | {"step_seconds": seconds[-1]})
            bar.set_postfix(values, refresh=False)
            bar.update()
            raise_if_interrupted()
            unfinished = len(self._losses) < len(batches)
            if unfinished and time.perf_counter() > self._next_checkpoint:
                self._save()
        self._end_of_epoch(progress, batches, math.fsum(seconds) / len(seconds))

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Return the indices of the windows in each step of an epoch.

        Epoch e takes the (e+1)-th permutation that one generator draws.
        """
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        for _ in range(epoch + 1):
            windows = torch.randperm(self.windows, generator=generator)
        return windows.split(self.settings.batch_size)[: self.steps - epoch * self.steps_an_epoch]

    def step(self, batch: Tensor, progress: Progress) -> dict[str, float]:
        """Make one update by the windows of a batch, int64 `(windows,)`.

        The host waits for the device twice: when the learner begins, and for the loss after
        backward is launched. Each rank computes its portions of the batch; all ranks make the same
        update.

        Returns:
            The `loss` before the update, and the learner's measures of the step.

        Raises:
            TrainingError: the loss is not finite; nothing is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(progress)
        total = self.objective.backward(batch)
        parallel.all_reduce([total])
        values = {"loss": total, **self.learner.step_values(progress)}
        # One transfer from the device for all values.
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        if not math.isfinite(numbers[0]):
            raise self._failure(progress, self.objective.broken(batch))
        learning = self.learner.parameters()
        parallel.all_reduce(tensor.grad for tensor in learning if tensor.grad is not None)
        if self.settings.clip is not None:
            self.objective.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(learning, self.settings.clip)
        self.objective.scaler.step(self.optimizer)
        self.objective.scaler.update()
        self.scheduler.step()
        return dict(zip(values, numbers, strict=True))

    def _begin(self, progress: Progress) -> None:
        try:
            self.learner.begin(progress)
        except ValueError as error:
            raise self._failure(progress, str(error)) from error

    def _end_of_epoch(
        self, progress: Progress, batches: Sequence[Tensor], step_seconds: float
    ) -> None:
        measured = None
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(progress)
        sums = torch.stack([values.detach().sum() for values in self.learner.parameters()])
        if not bool(sums.isfinite().all()):
            raise self._failure(progress, "what is learned is not finite")
        if progress.epoch >= self.epochs - (self.settings.select_from or 0):
            measured = self.objective.mean()
            if not math.isfinite(measured):
                raise self._failure(progress, self.objective.broken(torch.arange(self.windows)))
            if measured < self.best_loss:
                self.best_loss = measured
                self.learner.keep()
        elif math.isinf(self.best_loss):  # no epoch was measured yet
            self.learner.keep()
        sizes = [len(batch) for batch in batches]  # the last step may have fewer windows
        weighted = (loss * size for loss, size in zip(self._losses, sizes, strict=True))
        values: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "first_layer": self.stage.layers[0],
            "last_layer": self.stage.layers[-1],
            "loss": math.fsum(weighted) / sum(sizes),
            "measured_loss": measured,
            **self.learner.epoch_values(progress),
            "step_seconds": step_seconds,
            "peak_memory_bytes": peak_memory(self.problem.device),
        }
        self.history.append(values)
        self._losses = []
        self._save()
        self.problem.on_epoch(values)

    def _failure(self, progress: Progress, reason: str) -> TrainingError:
        return TrainingError(f"{self.name.upper()} stopped in epoch {progress.epoch + 1}: {reason}")

    def _save(self) -> None:
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
            "scaler": self.objective.scaler.state_dict(),
            "best_loss": self.best_loss,
            "learner": self.learner.state(),
        }
        save_state(self.problem.directory / self._file, state)
        now = time.perf_counter()
        self._next_checkpoint = now + max(
            CHECKPOINT_SECONDS, CHECKPOINT_TIMES_WRITING * (now - started)
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same stage (see `read_checkpoint`)."""
        self.learner.restore(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.objective.scaler.load_state_dict(state["scaler"])
        self.done = state["step"]
        self.best_loss = state["best_loss"]
        self._losses = list(state["losses"])
        log.info("continuing after step %d of %d", self.done, self.steps)


def read_checkpoint(problem: LearningProblem, file: str) -> dict[str, Any] | None:
    """Read the checkpoint that an interrupted run has left; None: there is none, or it is damaged.

    Without a checkpoint learning starts over.
    """

    def read() -> dict[str, Any] | None:
        if problem.directory is None or not (problem.directory / file).is_file():
            return None
        try:
            # All ranks would put the tensors of rank 0 onto its GPU.
            alone = parallel.world_size() == 1
            device = problem.device if alone else torch.device("cpu")
            return load_state(problem.directory / file, device)
        except DataError as error:
            log.warning("%s: learning starts over", error)
            return None

    return parallel.on_main(read)
