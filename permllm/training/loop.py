"""The training loop over one window of decoder layers, whatever learns in it: its steps, its measures, its checkpoint."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from permllm.errors import DataError, TrainingError
from permllm.models.families import ChannelGroup
from permllm.models.layers import layer_inputs, run_layer
from permllm.models.offload import placement_of
from permllm.runs.tensors import load_state, save_state
from permllm.runtime import parallel
from permllm.runtime.memory import free_memory, peak_memory
from permllm.runtime.precision import gradient_scaler, product_dtype, recomputed
from permllm.training.batches import Batch, Batches
from permllm.training.losses import loss_named
from permllm.training.problem import LearningProblem
from permllm.training.settings import DescentSettings, LearningSettings

log = logging.getLogger(__name__)

# What layers may keep for backward: a share of a GPU's free memory; bytes on a CPU, whose memory others use too.
_SHARE_OF_FREE, KEPT_ON_A_HOST = 0.8, 4e9
# Seconds between checkpoints: one is written at the end of an epoch, and in the middle of one that takes longer; and how many
# times as long as writing one takes learning goes on.
_CHECKPOINT_EVERY, _TIMES_WRITING = 120.0, 50.0


@dataclass(frozen=True)
class Window:
    """Consecutive decoder layers that learn together.

    Attributes:
        number: from 0, over all windows.
        first: index of its first decoder layer.
        stop: index after its last.
        inputs: of the first layer, from the pruned layers before, `(samples, tokens, hidden)` on the host; None where they are
            the embeddings.
        target: dense output of the last layer, like `inputs`.
    """

    number: int
    first: int
    stop: int
    inputs: Tensor | None
    target: Tensor

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.first <= layer < self.stop


class Moment(NamedTuple):
    """Where learning stands.

    Attributes:
        step: from 0.
        steps: in all.
        epoch: from 0.
        epochs: in all.
    """

    step: int
    steps: int
    epoch: int
    epochs: int


class Learner(ABC):
    """What learns in a window, such as the orders or the masks, and sets the masked linears accordingly."""

    @property
    def gathers(self) -> bool:
        """Its masked linears keep inputs in an order of their own for backward."""
        return False

    def masked_weights(self) -> int:
        """Numbers of masked weights that wait for backward."""
        return 0

    @abstractmethod
    def parameters(self) -> list[dict[str, Any]]:
        """Its groups of parameters, for the optimizer."""

    @abstractmethod
    def keep(self) -> None:
        """What was learned so far is the best."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """For a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""

    def begin(self, moment: Moment) -> None:  # noqa: B027 - there may be nothing to do
        """Prepare a step, or a measurement of what was learned so far.

        Raises:
            ValueError: it is not finite; the message says what.
        """

    def set_layer(self, index: int, moment: Moment | None) -> None:  # noqa: B027
        """Before a decoder layer runs; None asks for no gradients."""

    def collect(self) -> None:  # noqa: B027
        """After backward: have the gradients where `parameters` are."""

    def flips(self) -> Tensor | None:
        """How much of what it decides has changed at the last `begin`, a scalar on the device; None where nobody counts."""
        return None

    def step_values(self, moment: Moment, flips: float | None) -> dict[str, float]:
        """What to tell of a step."""
        return {}

    def begin_epoch(self) -> None:  # noqa: B027
        """An epoch begins."""

    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        """What to tell of an epoch, at its end."""
        return {}

    def write_best(self, directory: Path) -> str:
        """Write the best into a directory, because learning has failed; how to use it, for a person, or nothing."""
        return ""


class Training:
    """One run of the optimisation over a window.

    Args:
        settings: of the descent.
        problem: the model, whose linears in the window are masked linears now or hold the weights that learn, and the samples.
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
        self.name, self.file = name, file
        self._placement = placement_of(problem.model)
        self.device = problem.device
        # Fused: no temporaries of the size of all parameters.
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=settings.weight_decay, fused=fused)
        self.scaler = gradient_scaler(next(problem.model.parameters()).dtype, self.device)
        self.count = samples_of(settings, problem)
        self.steps_an_epoch = math.ceil(self.count / settings.batch_size)
        self.steps = steps_of(settings, self.count)
        self.epochs = math.ceil(self.steps / self.steps_an_epoch)
        tokens = self.steps * settings.batch_size * problem.tokens.shape[1]
        self.loss = loss_named(str(settings.loss), problem.model, tokens, settings.compile)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)
        self.done = 0  # steps
        self.best_loss = math.inf
        self.history = [] if history is None else history
        self.samples = Batches(problem.tokens, window.target, window.inputs, self.device)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._recomputes: bool | None = None
        self._losses: list[float] = []  # of the steps of the present epoch
        self._next_save = time.perf_counter() + _CHECKPOINT_EVERY

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
                    self.problem.on_step(self.window.number * self.steps + moment.step, told | {"seconds": seconds[-1]})
                    progress.update()
                    progress.set_postfix({key: f"{value:.4f}" for key, value in told.items()})
                    if time.perf_counter() > self._next_save and after is not None:
                        self._save()
                self._end_of_epoch(moment, batches, math.fsum(seconds) / len(seconds))

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Return the samples of each step of an epoch: epoch e takes the (e+1)-th permutation of one generator."""
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        for _ in range(epoch + 1):
            samples = torch.randperm(self.count, generator=generator)
        return samples.split(self.settings.batch_size)[: self.steps - epoch * self.steps_an_epoch]

    def step(self, batch: Tensor, moment: Moment, after: Tensor | None = None) -> tuple[float, dict[str, float]]:
        """One update from the samples at the indices `batch`.

        The host waits for the device for what orders learn from, and for the loss when backward is on its way (and where the
        model itself looks at its mask).
        Under torchrun each process computes its share of the batch, and all make the same update.

        Args:
            batch: int64 `(samples,)`.
            moment: of the step.
            after: the next batch, to be fetched while the device works on this one; None where there is none.

        Returns:
            The loss before the update, and what the learner tells of the step.

        Raises:
            TrainingError: the loss is not finite; nothing is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(moment)
        total = self._backward(batch, moment, after)
        parallel.add_up([total])
        counted = self.learner.flips()
        # One transfer for both.
        value, *flips = torch.stack([total.double(), *([] if counted is None else [counted.double()])]).tolist()
        if not math.isfinite(value):
            raise TrainingError(self._failure(moment, self._where(batch)))
        self._add_up_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return value, self.learner.step_values(moment, flips[0] if flips else None)

    def _backward(self, batch: Tensor, moment: Moment, after: Tensor | None = None) -> Tensor:
        """The loss of this process's share of a batch, a part of the mean over all of it, whose gradients are left."""
        portions = self._portions(batch)
        following = [] if after is None else self._portions(after)
        # In the format of the loss, which a process without a sample does not have.
        dtype = torch.promote_types(next(self.problem.model.parameters()).dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=self.device)
        for portion, ahead in zip_longest(portions, [*portions[1:], *following[:1]]):
            if portion is not None and not len(portion):
                self._visit(backward=True)
            elif portion is not None:
                loss = self._loss(portion, moment) * (len(portion) / len(batch))
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total = total + loss.detach()
            if ahead is not None and len(ahead):
                self.samples.fetch(ahead)
        self.learner.collect()
        return total

    def _portions(self, batch: Tensor) -> list[Tensor]:
        """The share of a batch that falls to this process, in parts that are computed together."""
        return parallel.share(batch, self.settings.micro_batch_size)

    def _visit(self, backward: bool) -> None:
        """Have the layers come as they do where there is a sample: other processes may hold them together with this one."""
        layers = range(self.window.first, self.window.stop)
        for index in (*layers, *(reversed(layers) if backward else ())):
            with self._placement.layer(index):
                pass

    def _begin(self, moment: Moment) -> None:
        try:
            self.learner.begin(moment)
        except ValueError as error:
            raise TrainingError(self._failure(moment, str(error))) from error

    def _add_up_gradients(self) -> None:
        if parallel.world_size() > 1:
            parameters = [parameter for group in self.learner.parameters() for parameter in group["params"]]
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            parallel.add_up(parameter.grad for parameter in parameters if parameter.grad is not None)

    def _end_of_epoch(self, moment: Moment, batches: Sequence[Tensor], step_seconds: float) -> None:
        measured = None
        self.optimizer.zero_grad(set_to_none=True)
        self._begin(moment)
        if moment.epoch >= self.epochs - self.settings.select_from:
            measured = self._measure()
            if not math.isfinite(measured):
                raise TrainingError(self._failure(moment, self._where(torch.arange(self.count))))
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
            "loss": math.fsum(loss * size for loss, size in zip(self._losses, sizes, strict=True)) / sum(sizes),
            "measured_loss": measured,
        }
        values |= self.learner.epoch_values(moment)
        values |= {"step_seconds": step_seconds, "peak_memory_bytes": peak_memory(self.device)}
        self.history.append(values)
        self._losses = []
        self._save()
        self.problem.on_epoch(values)

    @torch.no_grad()
    def _measure(self) -> float:
        """Loss of all samples with what was learned so far, mean over tokens."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in parallel.share(torch.arange(self.count), self.problem.calibration_batch_size):
            if len(batch):
                total += self._loss(batch, None).double() * len(batch)
            else:
                self._visit(backward=False)
        parallel.add_up([total])
        return float(total) / self.count

    def _loss(self, indices: Tensor, moment: Moment | None) -> Tensor:
        batch = self.samples.take(indices)
        hidden, kwargs = self._inputs(batch)
        recompute = torch.is_grad_enabled() and self._recompute(hidden)
        if recompute and self._placement.streams and parallel.world_size() > 1:
            # Layers that nothing learns in come again in backward too, as in a process that has no sample (`_visit`).
            hidden = hidden.detach().requires_grad_()
        for index in range(self.window.first, self.window.stop):
            if recompute:
                hidden = recomputed(self._layer, index, hidden, kwargs[index], moment)
            else:
                hidden = self._layer(index, hidden, kwargs[index], moment)
        return self.loss(hidden, batch.target)

    def _layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any], moment: Moment | None) -> Tensor:
        """One decoder layer as the learner sets it; what gradients go through is rebuilt in backward, one layer at a time."""
        self.learner.set_layer(index, moment if torch.is_grad_enabled() else None)
        with self._placement.layer(index) as layer:
            return run_layer(layer, hidden, kwargs)

    def _inputs(self, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        """Input of the window's first layer, and the keyword arguments of all layers."""
        samples = len(batch.tokens)
        if batch.inputs is not None and samples in self._kwargs:
            return batch.inputs, self._kwargs[samples]
        found = layer_inputs(self.problem.model, batch.tokens)
        self._kwargs[samples] = found.kwargs
        return (found.hidden if batch.inputs is None else batch.inputs), found.kwargs

    def _recompute(self, hidden: Tensor) -> bool:
        """Whether backward computes each decoder layer anew instead of keeping what it needs; decided at the first step."""
        if self._placement.streams:  # else what backward needs would hold the weights of all layers
            return True
        if self.settings.activation_checkpointing is not None:
            return self.settings.activation_checkpointing
        if self._recomputes is None:
            tokens = hidden.numel() // hidden.shape[-1]
            item = hidden.element_size()
            kept = tokens * kept_a_token(self.problem.groups, hidden.shape[-1], item, self.learner.gathers) * item
            kept *= self.window.stop - self.window.first
            if self.device.type == "cuda":
                allowed = _SHARE_OF_FREE * (free_memory(self.device) - self._not_yet_taken(hidden))
            else:
                allowed = KEPT_ON_A_HOST
            self._recomputes = kept > allowed
        return self._recomputes

    def _not_yet_taken(self, hidden: Tensor) -> float:
        """Bytes that a step takes beside activations, and that are free as long as none was made."""
        learning = [values for group in self.optimizer.param_groups for values in group["params"]]
        size = sum(values.numel() * values.element_size() for values in learning)
        moments = 0 if self.optimizer.state else 2  # a checkpoint has brought them
        # What a weight that learns is rounded to for products waits for backward.
        product = product_dtype(hidden)
        rounded = sum(
            weight.numel() * product.itemsize
            for weight in self.problem.model.parameters()
            if weight.requires_grad and weight.dtype != product
        )
        return size * (1 + moments) + rounded + self.learner.masked_weights() * product.itemsize

    @torch.no_grad()
    def _where(self, indices: Tensor) -> str:
        """Which layer gives something that is not finite for some of the samples; all processes look at all of them alike."""
        for batch in indices.split(self.problem.calibration_batch_size):
            hidden, kwargs = self._inputs(self.samples.take(batch))
            broken = None
            for index in range(self.window.first, self.window.stop):  # all of them, as other processes do
                hidden = self._layer(index, hidden, kwargs[index], None)
                if broken is None and not bool(hidden.isfinite().all()):
                    broken = index
            if broken is not None:
                return f"the loss is not finite: the output of decoder layer {broken} is not"
        return "the loss is not finite, although the output of every layer is"

    def _failure(self, moment: Moment, reason: str) -> str:
        text = f"{self.name.upper()} stopped in epoch {moment.epoch + 1}: {reason}"
        directory = self.problem.directory
        if directory:
            text += self.learner.write_best(directory)
        return text

    def _save(self) -> None:
        if self.problem.directory is None or parallel.rank():
            return
        started = time.perf_counter()
        state = {
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
        save_state(self.problem.directory / self.file, state)
        now = time.perf_counter()
        self._next_save = now + max(_CHECKPOINT_EVERY, _TIMES_WRITING * (now - started))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same window (see `read_checkpoint`)."""
        self.learner.restore(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.done, self.best_loss, self._losses = state["step"], state["best_loss"], list(state["losses"])
        log.info("continuing after step %d of %d", self.done, self.steps)


def read_checkpoint(problem: LearningProblem, file: str) -> dict[str, Any] | None:
    """Read the checkpoint that an interrupted run left; None: there is none, or it is unreadable and learning begins anew."""
    path = problem.directory / file if problem.directory else None
    if path is None or not path.is_file():
        return None
    try:
        return load_state(path, problem.device)
    except DataError as error:
        log.warning("%s: learning begins anew", error)
        path.unlink()
        return None


def samples_of(settings: DescentSettings, problem: LearningProblem) -> int:
    """How many of the samples are learned from."""
    return min(len(problem.tokens), settings.samples or len(problem.tokens))


def steps_of(settings: DescentSettings, samples: int) -> int:
    """How many steps a window has."""
    return settings.steps or settings.epochs * math.ceil(samples / settings.batch_size)


def steps_in_all(settings: LearningSettings, samples: int, layers: int) -> int:
    """How many steps all windows have, of a model of so many decoder layers."""
    return len(settings.spans(layers)) * steps_of(settings, samples)


def kept_a_token(groups: Iterable[ChannelGroup], hidden: int, item: int, gathers: bool = False) -> int:
    """Numbers that a decoder layer keeps for backward, a token: about 11 vectors of the residual stream and 4 of the MLP.

    Args:
        groups: channel groups of the model.
        hidden: width of the residual stream.
        item: bytes of one of them.
        gathers: each linear keeps its inputs in an order of its own, which otherwise are one tensor for a group. In float32
            that is within what is said of all; in half precision norms, which compute in float32, take that room.
    """
    groups = list(groups)
    inner = max((group.channels for group in groups if group.table.producers and not group.table.by_head), default=hidden)
    layers = len({group.layer for group in groups})
    copies = sum(group.channels * (len(group.members) - 1) for group in groups) // layers if gathers and item < 4 else 0
    return 11 * hidden + 4 * inner + copies
