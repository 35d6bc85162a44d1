"""The training loop of LCP over one window of decoder layers: its state, its steps, its checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import InstanceOf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from permllm.errors import DataError, TrainingError
from permllm.learning.batches import Batch, Batches
from permllm.learning.kernels import Kernels
from permllm.learning.masked_linear import PermutedMaskedLinear
from permllm.learning.problem import LearningProblem
from permllm.learning.stacks import count_logits
from permllm.models.decoder import layer_inputs, run_layer
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.losses import loss_named
from permllm.permutation.lcp.assignment import flatten, harden_together
from permllm.permutation.lcp.blocks import BlockLogits
from permllm.permutation.lcp.settings import LCPSettings
from permllm.permutation.shared import SharedOrder, expanded
from permllm.record.names import BEST_SO_FAR, CHECKPOINT
from permllm.record.run_tensors import check_order, write_orders
from permllm.record.schema import Object, Positive, Whole
from permllm.record.tensors import read_torch, write_torch
from permllm.runtime import parallel
from permllm.runtime.memory import free_memory, peak_memory, to_device

log = logging.getLogger(__name__)

# What layers may keep for backward: a share of a GPU's free memory; bytes on a CPU, whose memory others use too.
_SHARE_OF_FREE, _KEPT_ON_A_HOST = 0.8, 4e9


@dataclass
class Window:
    """Consecutive decoder layers that learn together.

    Attributes:
        number: from 0, over all windows and rounds.
        round: of the window, from 0.
        first: index of its first decoder layer.
        stop: index after its last.
        shared: the orders that its layers use.
        learning: those of them that learn.
        inputs: of the first layer, from the pruned layers before, `(samples, tokens, hidden)` on the host; None where they are
            the embeddings.
        target: dense output of the last layer, like `inputs`.
    """

    number: int
    round: int
    first: int
    stop: int
    shared: list[SharedOrder]
    learning: list[SharedOrder]
    inputs: Tensor | None
    target: Tensor

    def members(self, layer: int | None = None) -> Iterator[tuple[SharedOrder, ChannelGroup]]:
        """The channel groups of its layers, or of one of them, each with the order that it uses."""
        for order in self.shared:
            for group in order.groups:
                if self.first <= group.layer < self.stop if layer is None else group.layer == layer:
                    yield order, group


class Training:
    """One run of the optimisation over a window.

    Args:
        settings: of LCP.
        problem: the model, whose linears in the window are masked linears now, and the samples.
        shared: all orders of the model.
        window: what learns.
        orders: int64 `(channels,)` of all orders of the model at the start.
        logits: by order that learns.
        linears: masked linears by channel group of the window.
        best_loss: measured loss of the orders at the start, where it is known.
        passes: what each epoch that is done found, over all windows; grows.
    """

    def __init__(
        self,
        settings: LCPSettings,
        problem: LearningProblem,
        shared: list[SharedOrder],
        window: Window,
        orders: dict[str, Tensor],
        logits: dict[str, BlockLogits],
        linears: dict[str, list[PermutedMaskedLinear]],
        best_loss: float = math.inf,
        passes: list[dict[str, Any]] | None = None,
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.shared = shared
        self.window = window
        self.logits = nn.ModuleDict({name.replace(".", "/"): block for name, block in logits.items()})
        self.blocks = logits
        self.linears = linears
        self.layers = decoder_layers(problem.model)
        self.device = problem.device
        self.loss = loss_named(str(settings.loss), problem.model)
        # Fused: no temporaries of the size of all logits.
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            self.logits.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused
        )
        self.steps_an_epoch = math.ceil(len(problem.tokens) / settings.batch_size)
        self.steps = self.steps_an_epoch * settings.epochs
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)
        self.generator = torch.Generator().manual_seed(problem.seed + 1 + 1000 * window.round)
        self.done = 0
        self.harden_seconds = 0.0  # of the latest step
        self.best_loss = best_loss
        self.passes = [] if passes is None else passes
        self.present: dict[str, Tensor] = {name: block.base for name, block in logits.items()}
        self.fixed = {order.name: orders[order.name].to(self.device) for order in window.shared if order.name not in logits}
        self.hard: dict[str, Tensor] = {}
        self.potentials: dict[str, list[list[Tensor]]] = {}
        self.best = {name: order.cpu() for name, order in orders.items()}  # those outside of the window too
        self.samples = Batches(problem.tokens, window.target, window.inputs, self.device)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._recomputes: bool | None = None

    def run(self) -> dict[str, Tensor]:
        """All epochs that are left; the best of all shared orders."""
        channels = sum(order.channels for order in self.window.learning)
        label = f"lcp, layers {self.window.first} to {self.window.stop - 1}"
        with tqdm(total=self.steps, initial=self.done * self.steps_an_epoch, desc=label, unit="step") as progress:
            for number in range(self.done, self.settings.epochs):
                started = time.perf_counter()
                before = dict(self.present)
                losses: list[float] = []
                order = torch.randperm(len(self.problem.tokens), generator=self.generator)
                batches = order.split(self.settings.batch_size)
                following = iter(batches[1:])
                for batch in batches:
                    step_started = time.perf_counter()
                    step = number * self.steps_an_epoch + len(losses)
                    temperature = self._temperature(step)
                    loss, flips = self.step(batch, temperature, after=next(following, None))
                    losses.append(loss)
                    values = {"loss": loss, "temperature": temperature, "flips": flips / channels}
                    values["seconds"] = time.perf_counter() - step_started
                    self.problem.on_step(self.window.number * self.steps + step, values)
                    progress.update()
                    progress.set_postfix(loss=f"{loss:.4f}", tau=f"{temperature:.2f}")
                self._end_of_epoch(number, losses, before, time.perf_counter() - started, channels)
        return self.best

    def step(self, batch: Tensor, temperature: float, after: Tensor | None = None) -> tuple[float, int]:
        """One update of the logits from the samples at the indices `batch`.

        The host waits for the device for the soft permutations, and for the loss when backward is on its way (and where the
        model itself looks at its mask).
        Under torchrun each process computes its share of the batch, and all make the same update.

        Args:
            batch: int64 `(samples,)`.
            temperature: of the soft permutations.
            after: the next batch, to be fetched while the device works on this one; None where there is none.

        Returns:
            The loss before the update, and the number of channels whose position is another than before the step.

        Raises:
            TrainingError: the loss is not finite; nothing is updated.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._perturb(self.settings.gumbel * temperature)
        before = self.present
        self._harden(temperature)
        mine = parallel.share(batch)
        loss = torch.zeros((), device=self.device)
        if len(mine):
            loss = self._loss(mine, temperature) * (len(mine) / len(batch))
            loss.backward()
        if after is not None:
            self.samples.fetch(parallel.share(after))
        total = loss.detach().clone()
        parallel.add_up([total])
        value, flips = torch.stack([total.double(), _flips(before, self.present).double()]).tolist()
        if not math.isfinite(value):
            raise TrainingError(self._failure(self._where(batch)))
        self._add_up_gradients()
        self.optimizer.step()
        self.scheduler.step()
        return value, int(flips)

    def _add_up_gradients(self) -> None:
        if parallel.world_size() > 1:
            parameters = list(self.logits.parameters())
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            parallel.add_up(parameter.grad for parameter in parameters if parameter.grad is not None)

    def _temperature(self, step: int) -> float:
        if self.settings.temperature_every == "epoch":
            return self.settings.temperature(step // self.steps_an_epoch / self.settings.epochs)
        return self.settings.temperature(step / max(1, self.steps - 1))

    def _end_of_epoch(
        self, number: int, losses: list[float], before: dict[str, Tensor], seconds: float, channels: int
    ) -> None:
        temperature = self._temperature((number + 1) * self.steps_an_epoch - 1)
        measured = None
        self.optimizer.zero_grad(set_to_none=True)
        self._perturb(0.0)
        self._harden(temperature)
        if number >= self.settings.epochs - self.settings.select_from:
            measured = self._measure()
            if not math.isfinite(measured):
                raise TrainingError(self._failure(self._where(torch.arange(len(self.problem.tokens))[:1])))
        # An order that was not measured is better than none, but not than one that was.
        if not math.isfinite(self.best_loss) if measured is None else measured < self.best_loss:
            self.best |= {name: order.cpu() for name, order in self.present.items()}
        if measured is not None:
            self.best_loss = min(self.best_loss, measured)
        self.done = number + 1
        values = {
            "pass": number + 1,
            "round": self.window.round + 1,
            "first_layer": self.window.first,
            "last_layer": self.window.stop - 1,
            "loss": sum(losses) / len(losses),
            "measured_loss": measured,
            "temperature": temperature,
            "flips": float(_flips(before, self.present)) / channels,
            "step_seconds": seconds / len(losses),
            "peak_memory_bytes": peak_memory(self.device),
        }
        self.passes.append(values)
        self._save()
        self.problem.on_pass(values)

    def _perturb(self, width: float) -> None:
        if self.settings.gumbel:
            for block in self.blocks.values():
                block.perturb(width, self.generator)

    @torch.no_grad()
    def _harden(self, temperature: float) -> None:
        """Every order that learns, from the present logits. Soft permutations exist one order at a time."""
        learning = self.window.learning
        flat, shapes = flatten(
            self._softs(temperature), sum(count_logits(self.blocks[order.name].stacks) for order in learning)
        )
        started = time.perf_counter()
        try:
            hards = harden_together(flat, shapes)
        except ValueError as error:
            raise TrainingError(self._failure(f"the soft permutation of {self._broken(temperature)} is not finite")) from error
        self.harden_seconds = time.perf_counter() - started
        on_device = to_device(torch.cat([hard.flatten() for hard in hards]), self.device)
        parts = on_device.split([order.channels for order in learning])
        self.hard = {order.name: hard for order, hard in zip(learning, parts, strict=True)}
        self.present = {name: self.blocks[name].order(hard) for name, hard in self.hard.items()}

    def _softs(self, temperature: float) -> Iterator[Tensor]:
        for name, block in self.blocks.items():
            softs, self.potentials[name] = self._normalized(block, temperature)
            yield from softs

    def _normalized(self, block: BlockLogits, temperature: float) -> tuple[list[Tensor], list[list[Tensor]]]:
        return block.normalized(temperature, self.settings.sinkhorn_iterations, self.settings.sinkhorn_start)

    def _broken(self, temperature: float) -> str:
        for name, block in self.blocks.items():
            soft, _ = self._normalized(block, temperature)
            if not all(bool(stack.isfinite().all()) for stack in soft):
                return name
        return "some order"

    @torch.no_grad()
    def _measure(self) -> float:
        """Loss of all samples with the order as it is, mean over tokens."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in parallel.share(torch.arange(len(self.problem.tokens))).split(self.problem.calibration_batch_size):
            if len(batch):
                total += self._loss(batch, temperature=None).double() * len(batch)
        parallel.add_up([total])
        return float(total) / len(self.problem.tokens)

    def _loss(self, indices: Tensor, temperature: float | None) -> Tensor:
        batch = self.samples.take(indices)
        hidden, kwargs = self._inputs(batch)
        recompute = torch.is_grad_enabled() and self._recompute(hidden)
        for index in range(self.window.first, self.window.stop):
            if recompute:
                hidden = checkpoint(self._layer, index, hidden, kwargs[index], temperature, use_reentrant=False)
            else:
                hidden = self._layer(index, hidden, kwargs[index], temperature)
        return self.loss(hidden, batch.target)

    def _layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any], temperature: float | None) -> Tensor:
        """One decoder layer in the present order; soft permutations are rebuilt in backward, one group at a time."""
        for order, group in self.window.members(index):
            self._set_order(order, self.linears[group.name], temperature)
        return run_layer(self.layers[index], hidden, kwargs)

    def _set_order(self, order: SharedOrder, linears: list[PermutedMaskedLinear], temperature: float | None) -> None:
        if order.name in self.fixed:
            for linear in linears:
                linear.set_order(order.expand(self.fixed[order.name]))
            return
        soft = []
        if torch.is_grad_enabled() and temperature is not None:
            soft = self.blocks[order.name].gradient_paths(temperature, self.potentials[order.name])
            soft = order.expand_blocks(soft)
        perm, hard = order.expand(self.present[order.name]), order.expand_rows(self.hard[order.name])
        for linear in linears:
            linear.set_order(perm, hard, soft)

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
        if self.settings.activation_checkpointing is not None:
            return self.settings.activation_checkpointing
        if self._recomputes is None:
            tokens = hidden.numel() // hidden.shape[-1]
            kept = tokens * _kept_a_token(self.problem.groups, hidden.shape[-1]) * hidden.element_size()
            allowed = _SHARE_OF_FREE * free_memory(self.device) if self.device.type == "cuda" else _KEPT_ON_A_HOST
            self._recomputes = kept * (self.window.stop - self.window.first) > allowed
        return self._recomputes

    @torch.no_grad()
    def _where(self, indices: Tensor) -> str:
        hidden, kwargs = self._inputs(self.samples.take(indices))
        for index in range(self.window.first, self.window.stop):
            hidden = self._layer(index, hidden, kwargs[index], temperature=None)
            if not bool(hidden.isfinite().all()):
                return f"the loss is not finite: the output of decoder layer {index} is not"
        return "the loss is not finite, although the output of every layer is"

    def _failure(self, reason: str) -> str:
        text = f"LCP stopped in epoch {self.done + 1}: {reason}"
        if self.problem.directory:
            file = self.problem.directory / BEST_SO_FAR
            if parallel.rank() == 0:
                write_orders(file, expanded(self.shared, self.best))
            text += f"; the best permutation so far is in {file} (permutation=from_file permutation.path={file})"
        return text

    def _save(self) -> None:
        if self.problem.directory is None or parallel.rank():
            return
        state: Checkpoint = {
            "run": self.problem.run,
            "window": self.window.number,
            "done": self.done,
            "passes": self.passes,
            "logits": self.logits.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "best_loss": self.best_loss,
            "best": self.best,
            "present": self.present,
        }
        write_torch(self.problem.directory / CHECKPOINT, state)

    def restore(self, state: Checkpoint) -> None:
        """Continue from a checkpoint of the same window (see `read_checkpoint`).

        Raises:
            DataError: its logits are others.
        """
        mine, its = (_shapes(part) for part in (self.logits.state_dict(), state["logits"]))
        if mine != its:
            raise DataError(f"{self.problem.directory}/{CHECKPOINT} has logits of other shapes: remove it to learn anew")
        self.logits.load_state_dict(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"].cpu())
        self.done, self.best_loss = state["done"], state["best_loss"]
        self.best = {name: order.cpu() for name, order in state["best"].items()}
        self.present = {name: order.to(self.device) for name, order in state["present"].items()}
        log.info("continuing after epoch %d of %d", self.done, self.settings.epochs)


class Checkpoint(TypedDict):
    """What `lcp_checkpoint.pt` holds: a training after an epoch (see `Training`)."""

    run: str
    window: Whole
    done: Positive
    passes: list[Object]
    logits: dict[str, InstanceOf[Tensor]]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    generator: InstanceOf[Tensor]
    best_loss: float
    best: dict[str, InstanceOf[Tensor]]
    present: dict[str, InstanceOf[Tensor]]


def read_checkpoint(problem: LearningProblem) -> Checkpoint | None:
    """The state after the latest epoch of an interrupted run; None where there is none, or none that can be continued."""
    file = problem.directory / CHECKPOINT if problem.directory else None
    if file is None or not file.is_file():
        return None
    try:
        state = read_torch(file, Checkpoint, problem.device)
        if state["run"] != problem.run:
            raise DataError(f"{file} is of another run")
        for name, order in state["best"].items():
            check_order(f"{file}: the permutation {name}", order)
    except DataError as error:
        log.warning("%s: learning begins anew", error)
        file.unlink()
        return None
    return state


@contextmanager
def masked_linears(
    settings: LCPSettings, problem: LearningProblem, window: Window, kernels: Kernels
) -> Iterator[dict[str, list[PermutedMaskedLinear]]]:
    """Put a masked linear in the place of every linear of the window, and the linears back at the end; by channel group.

    The weights are stored column by column meanwhile, which makes a permutation of channels a gather of rows.
    """
    replaced: dict[str, nn.Linear] = {}
    masked: dict[str, list[PermutedMaskedLinear]] = {}
    try:
        for order, group in window.members():
            masked[group.name] = []
            for path in group.members:
                linear = linear_at(problem.model, path)
                factors = problem.factors_of(path)
                if settings.normalize_saliency:
                    factors = factors.scaled(1.0 / problem.saliency_of(path).mean().clamp_min(torch.finfo(torch.float32).tiny))
                linear.weight.data = linear.weight.data.t().contiguous().t()
                replaced[path] = linear
                stacks = order.group_stacks(settings.block_size)
                stand_in = PermutedMaskedLinear(linear, factors, problem.pattern, stacks, settings.straight_through, kernels)
                problem.model.set_submodule(path, stand_in)
                masked[group.name].append(stand_in)
        yield masked
    finally:
        for path, linear in replaced.items():
            linear.weight.data = linear.weight.data.contiguous()
            problem.model.set_submodule(path, linear)


def _kept_a_token(groups: list[ChannelGroup], hidden: int) -> int:
    """Numbers that a decoder layer keeps for backward, a token: about 11 vectors of the residual stream and 4 of the MLP."""
    inner = max((group.channels for group in groups if group.table.producers and not group.table.by_head), default=hidden)
    return 11 * hidden + 4 * inner


def _flips(before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    """Number of channels whose position differs, a scalar on the device."""
    return (torch.cat(list(before.values())) != torch.cat([after[name] for name in before])).sum()


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
