"""Learnable channel permutation (PermLLM, section 4): the settings, the start, and the training loop.

All logits of a window of decoder layers learn together, end to end, against the dense model's output of the window's last
layer. The weights stay as they are. Forward uses hard permutations and hard masks; backward goes through the soft ones.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from permllm.errors import TrainingError
from permllm.memory import peak_memory
from permllm.models.decoder import LayerStream, layer_inputs, run_layer
from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.permutation.assignment import harden_all
from permllm.permutation.blocks import BlockLogits, split_blocks
from permllm.permutation.heuristic import heuristic_order
from permllm.permutation.kernels import EAGER, Kernels, compiled_kernels
from permllm.permutation.masked_linear import PermutedMaskedLinear, StraightThrough
from permllm.pruning.saliency import SaliencyFactors, saliency
from permllm.results.files import write_tensors, write_torch
from permllm.sparsity import NMPattern, permuted_nm_mask
from permllm.validation import check_number, check_one_of, check_whole

log = logging.getLogger(__name__)

# Weights times steps. Compiling takes 10 to 20 s and saves some 15 ns a weight and step on two cores.
_COMPILE_FROM = 2e9


@dataclass
class LearningProblem:
    """What LCP learns from.

    Attributes:
        model: dense, of a known family; unchanged afterwards.
        groups: its channel groups, all layers.
        tokens: int64 `(samples, length)`.
        factors: saliency factors of every linear, by module path.
        target: dense output of the last decoder layer, `(samples, length, hidden)` on the host.
        pattern: N:M.
        seed: of the initial logits and the order of samples.
        calibration_batch_size: samples a forward where nothing is learned.
        directory: where the checkpoint goes; None keeps none.
        on_step: called after each step with loss, temperature, flips and seconds.
        on_pass: called after each pass with the same and the memory.
    """

    model: nn.Module
    groups: list[ChannelGroup]
    tokens: Tensor
    factors: dict[str, SaliencyFactors]
    target: Tensor
    pattern: NMPattern
    seed: int
    calibration_batch_size: int = 8
    directory: Path | None = None
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None
    on_pass: Callable[[dict[str, float | None]], None] = lambda values: None


@dataclass
class LCP:
    """Settings of learnable channel permutation.

    Args:
        block_size: B, channels that are permuted among themselves.
        temperature: schedule, from progress in [0, 1] to the Sinkhorn temperature.
        init: `heuristic` starts at RIA's order with logits close to the assignment boundary (`margin` on the identity plus
            `noise`); `random` is the paper's start: identity order, logits uniform in +-1/sqrt(B) times a learned scale that
            starts at sqrt(B), clamped to +-1.
        sinkhorn_iterations: L; 0 is the plain exponential.
        learning_rate: of AdamW, with a cosine schedule to zero over all steps.
        weight_decay: of AdamW.
        passes: over the calibration samples.
        batch_size: samples a step.
        straight_through: `hard` or `soft`, see `permllm.permutation.masked_linear`.
        last_layers: learn only the last so many decoder layers, the others get the heuristic order; None learns all.
        normalize_saliency: divide each linear's saliency by its mean before the group softmax.
        margin: logit of the start order over the others (`init=heuristic`).
        noise: half width of the uniform noise on the logits (`init=heuristic`).
        select_from: after each of the last so many passes the loss of all samples is measured with the order as it then is,
            and the best of these orders is the result; 1 takes the last. Losses during a pass do not tell: each step has its
            own order and its own samples.
        activation_checkpointing: recompute each decoder layer in backward; None decides by the size of the activations.
        compile: compile the elementwise work of the masked linears, which takes 10 to 20 seconds; None does it where that
            is soon made up for. Without a compiler the step is the slower one.
    """

    block_size: int
    temperature: Callable[[float], float]
    init: str = "heuristic"
    sinkhorn_iterations: int = 5
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    passes: int = 8
    batch_size: int = 4
    straight_through: StraightThrough = "hard"
    last_layers: int | None = None
    normalize_saliency: bool = True
    margin: float = 0.05
    noise: float = 0.02
    select_from: int = 2
    activation_checkpointing: bool | None = None
    compile: bool | None = None
    learned = True

    def __post_init__(self) -> None:
        check_one_of("permutation.init", self.init, ("heuristic", "random"))
        check_one_of("permutation.straight_through", self.straight_through, ("hard", "soft"))
        check_whole("permutation.sinkhorn_iterations", self.sinkhorn_iterations, 0)
        for name in ("passes", "batch_size", "select_from"):
            check_whole(f"permutation.{name}", getattr(self, name), 1)
        check_number("permutation.learning_rate", self.learning_rate, positive=True)
        for name in ("weight_decay", "margin", "noise"):
            check_number(f"permutation.{name}", getattr(self, name), positive=False)
        if self.last_layers is not None:
            check_whole("permutation.last_layers", self.last_layers, 1)

    def learn(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Learn the orders of all channel groups.

        Returns:
            int64 `(C_in,)` on the CPU by group: the best order of the last passes (`select_from`).

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is not, and where the best
                order so far is kept.
        """
        layers = len(decoder_layers(problem.model))
        first = max(0, layers - self.last_layers) if self.last_layers is not None else 0
        orders = self.start_orders(problem, first)
        window = [group for group in problem.groups if group.layer >= first]
        hidden = _inputs_after_pruning(problem, orders, first) if first else None
        logits = self.start_logits(problem, window, orders)
        with masked_linears(self, problem, window) as linears:
            return Training(self, problem, window, first, hidden, orders, logits, linears).run()

    def kernels(self, problem: LearningProblem, window: list[ChannelGroup]) -> Kernels:
        """The kernels for the elementwise work of the masked linears."""
        wanted = self.compile
        if wanted is None:
            steps = self.passes * math.ceil(len(problem.tokens) / self.batch_size)
            wanted = steps * sum(group.channels * sum(group.rows) for group in window) > _COMPILE_FROM
        compiled = compiled_kernels(next(problem.model.parameters()).device.type) if wanted else None
        return compiled or EAGER

    def start_orders(self, problem: LearningProblem, first: int) -> dict[str, Tensor]:
        """The orders that learning starts from, layers before `first` keeping theirs; int64 `(C_in,)` on the CPU by group."""
        orders = {}
        for group in tqdm(problem.groups, desc="start order", unit="group"):
            if self.init == "random" and group.layer >= first:
                orders[group.name] = torch.arange(group.channels)
            else:
                scores = [saliency(linear_at(problem.model, path).weight, _on_device(problem, path)) for path in group.members]
                orders[group.name] = heuristic_order(torch.cat(scores), problem.pattern)
        return orders

    def start_logits(
        self, problem: LearningProblem, window: list[ChannelGroup], orders: dict[str, Tensor]
    ) -> dict[str, BlockLogits]:
        """The logits of each group of the window at the start, on the model's device."""
        generator = torch.Generator().manual_seed(problem.seed)
        device = next(problem.model.parameters()).device
        logits = {}
        for group in window:
            start = []
            for stack in split_blocks(group.channels, self.block_size):
                uniform = torch.rand(stack.count, stack.size, stack.size, generator=generator) * 2 - 1
                if self.init == "heuristic":
                    start.append(self.margin * torch.eye(stack.size) + self.noise * uniform)
                else:
                    start.append(uniform / math.sqrt(self.block_size))
            scale = math.sqrt(self.block_size) if self.init == "random" else None
            logits[group.name] = BlockLogits(orders[group.name], self.block_size, start, scale).to(device)
        return logits


class Training:
    """One run of the optimisation over a window of layers: its state, its steps, its checkpoint."""

    def __init__(
        self,
        settings: LCP,
        problem: LearningProblem,
        window: list[ChannelGroup],
        first: int,
        hidden: Tensor | None,
        orders: dict[str, Tensor],
        logits: dict[str, BlockLogits],
        linears: dict[str, list[PermutedMaskedLinear]],
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.window = window
        self.first = first
        self.hidden = hidden
        self.logits = nn.ModuleDict({name.replace(".", "/"): block for name, block in logits.items()})
        self.blocks = logits
        self.linears = linears
        self.layers = decoder_layers(problem.model)
        self.device = next(problem.model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            self.logits.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        samples = len(problem.tokens)
        self.steps_a_pass = math.ceil(samples / settings.batch_size)
        self.steps = self.steps_a_pass * settings.passes
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)
        self.generator = torch.Generator().manual_seed(problem.seed + 1)
        self.done = 0
        self.harden_seconds = 0.0  # of the latest step
        self.best_loss = math.inf
        self.present: dict[str, Tensor] = {name: block.base for name, block in logits.items()}
        self.best = dict(orders)  # of all groups, those outside of the window included
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    @property
    def checkpoint_file(self) -> Path | None:
        """Where the state after each pass is kept."""
        return self.problem.directory / "lcp_checkpoint.pt" if self.problem.directory else None

    def run(self) -> dict[str, Tensor]:
        """All passes that are left; the best orders of all groups."""
        self._resume()
        channels = sum(group.channels for group in self.window)
        progress = tqdm(total=self.steps, initial=self.done * self.steps_a_pass, desc="lcp", unit="step")
        with progress:
            for number in range(self.done, self.settings.passes):
                started = time.perf_counter()
                before = dict(self.present)
                losses: list[float] = []
                for batch in torch.randperm(len(self.problem.tokens), generator=self.generator).split(
                    self.settings.batch_size
                ):
                    step_started = time.perf_counter()
                    step = number * self.steps_a_pass + len(losses)
                    temperature = self._temperature(step)
                    previous = dict(self.present)
                    loss = self.step(batch, temperature)
                    losses.append(loss)
                    values = {"loss": loss, "temperature": temperature, "flips": _flips(previous, self.present) / channels}
                    values["seconds"] = time.perf_counter() - step_started
                    self.problem.on_step(step, values)
                    progress.update()
                    progress.set_postfix(loss=f"{loss:.4f}", tau=f"{temperature:.2f}")
                self._end_of_pass(number, losses, before, time.perf_counter() - started, channels)
        return self.best

    def _temperature(self, step: int) -> float:
        return self.settings.temperature(step / max(1, self.steps - 1))

    def _end_of_pass(self, number: int, losses: list[float], before: dict[str, Tensor], seconds: float, channels: int) -> None:
        temperature = self._temperature((number + 1) * self.steps_a_pass - 1)
        measured = None
        with torch.no_grad():
            self._harden(temperature)
            if number >= self.settings.passes - self.settings.select_from:
                measured = self._measure()
                if not math.isfinite(measured):
                    raise TrainingError(self._failure(self._where(torch.arange(len(self.problem.tokens))[:1])))
        if measured is None or measured < self.best_loss:
            self.best |= {name: order.cpu() for name, order in self.present.items()}
        if measured is not None:
            self.best_loss = min(self.best_loss, measured)
        self.done = number + 1
        self._save()
        self.problem.on_pass(
            {
                "pass": number + 1,
                "loss": sum(losses) / len(losses),
                "measured_loss": measured,
                "temperature": temperature,
                "flips": _flips(before, self.present) / channels,
                "step_seconds": seconds / len(losses),
                "peak_memory_bytes": peak_memory(self.device),
            }
        )

    def _harden(self, temperature: float) -> None:
        """Set the order of every masked linear of the window from the present logits."""
        softs = [self.blocks[group.name].soft(temperature, self.settings.sinkhorn_iterations) for group in self.window]
        started = time.perf_counter()
        try:
            hards = harden_all([stack for soft in softs for stack in soft])
        except ValueError as error:
            pairs = zip(self.window, softs, strict=True)
            names = [group.name for group, soft in pairs if not all(bool(stack.isfinite().all()) for stack in soft)]
            raise TrainingError(self._failure(f"the soft permutation of {names[0]} is not finite")) from error
        self.harden_seconds = time.perf_counter() - started
        on_device = torch.cat([hard.flatten() for hard in hards]).to(self.device)
        for group, soft, hard in zip(self.window, softs, on_device.split([g.channels for g in self.window]), strict=True):
            perm = self.blocks[group.name].order(hard)
            for linear in self.linears[group.name]:
                linear.set_order(perm, hard, soft)
            self.present[group.name] = perm

    def step(self, batch: Tensor, temperature: float) -> float:
        """One update of the logits from the samples at the indices `batch`; the loss before it."""
        self._harden(temperature)
        loss = self._loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(self._failure(self._where(batch)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return value

    def _measure(self) -> float:
        """Loss of all samples with the order as it is, mean over tokens."""
        batches = torch.arange(len(self.problem.tokens)).split(self.problem.calibration_batch_size)
        return sum(float(self._loss(batch)) * len(batch) for batch in batches) / len(self.problem.tokens)

    def _loss(self, batch: Tensor) -> Tensor:
        hidden, kwargs = self._inputs(batch)
        recompute = torch.is_grad_enabled() and self._recompute(hidden)
        for index in range(self.first, len(self.layers)):
            if recompute:
                hidden = checkpoint(run_layer, self.layers[index], hidden, kwargs[index], use_reentrant=False)
            else:
                hidden = run_layer(self.layers[index], hidden, kwargs[index])
        return cosine_loss(hidden, self.problem.target[batch].to(self.device))

    def _inputs(self, batch: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        if self.hidden is not None and len(batch) in self._kwargs:
            return self.hidden[batch].to(self.device), self._kwargs[len(batch)]
        inputs = layer_inputs(self.problem.model, self.problem.tokens[batch])
        self._kwargs[len(batch)] = inputs.kwargs
        return (inputs.hidden if self.hidden is None else self.hidden[batch].to(self.device)), inputs.kwargs

    def _recompute(self, hidden: Tensor) -> bool:
        if self.settings.activation_checkpointing is not None:
            return self.settings.activation_checkpointing
        # A decoder layer keeps about 24 tensors of the size of its input for backward; recompute past 4 GB.
        return hidden.numel() * hidden.element_size() * 24 * (len(self.layers) - self.first) > 4e9

    @torch.no_grad()
    def _where(self, batch: Tensor) -> str:
        hidden, kwargs = self._inputs(batch)
        for index in range(self.first, len(self.layers)):
            hidden = run_layer(self.layers[index], hidden, kwargs[index])
            if not bool(hidden.isfinite().all()):
                return f"the loss is not finite: the output of decoder layer {index} is not"
        return "the loss is not finite, although the output of every layer is"

    def _failure(self, reason: str) -> str:
        text = f"LCP stopped in pass {self.done + 1}: {reason}"
        if self.problem.directory:
            file = self.problem.directory / "best_so_far.safetensors"
            write_tensors(file, self.best)
            text += f"; the best order so far is in {file} (permutation=from_file permutation.path={file})"
        return text

    def _save(self) -> None:
        if self.checkpoint_file is None:
            return
        state = {
            "done": self.done,
            "logits": self.logits.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "best_loss": self.best_loss,
            "best": self.best,
            "present": self.present,
        }
        write_torch(self.checkpoint_file, state)

    def _resume(self) -> None:
        if self.checkpoint_file is None or not self.checkpoint_file.is_file():
            return
        state = torch.load(self.checkpoint_file, map_location=self.device, weights_only=True)
        self.logits.load_state_dict(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"].cpu())
        self.done, self.best_loss = state["done"], state["best_loss"]
        self.best = {name: order.cpu() for name, order in state["best"].items()}
        self.present = state["present"]
        log.info("continuing after pass %d of %d", self.done, self.settings.passes)


def cosine_loss(output: Tensor, target: Tensor) -> Tensor:
    """`1 - cos(output, target)`, mean over tokens, in float32 or wider (PermLLM, equation 8).

    Args:
        output, target: `(batch, tokens, hidden)`.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    return 1.0 - nn.functional.cosine_similarity(output.to(wide), target.to(wide), dim=-1).mean()


@contextmanager
def masked_linears(
    settings: LCP, problem: LearningProblem, window: list[ChannelGroup]
) -> Iterator[dict[str, list[PermutedMaskedLinear]]]:
    """Put a masked linear in the place of every linear of the window, and the linears back at the end.

    The weights are stored column by column meanwhile, which makes a permutation of channels a gather of rows.
    """
    replaced: dict[str, nn.Linear] = {}
    masked: dict[str, list[PermutedMaskedLinear]] = {}
    kernels = settings.kernels(problem, window)
    try:
        for group in window:
            masked[group.name] = []
            for path in group.members:
                linear = linear_at(problem.model, path)
                factors = _on_device(problem, path)
                if settings.normalize_saliency:
                    mean = saliency(linear.weight, factors).mean().clamp_min(torch.finfo(torch.float32).tiny)
                    factors = factors.scaled(1.0 / mean)
                linear.weight.data = linear.weight.data.t().contiguous().t()
                replaced[path] = linear
                stand_in = PermutedMaskedLinear(
                    linear,
                    factors,
                    problem.pattern,
                    split_blocks(group.channels, settings.block_size),
                    settings.straight_through,
                    kernels,
                )
                problem.model.set_submodule(path, stand_in)
                masked[group.name].append(stand_in)
        yield masked
    finally:
        for path, linear in replaced.items():
            linear.weight.data = linear.weight.data.contiguous()
            problem.model.set_submodule(path, linear)


def _inputs_after_pruning(problem: LearningProblem, orders: dict[str, Tensor], first: int) -> Tensor:
    """Inputs of layer `first` when the layers before it are pruned in the given orders, `(samples, tokens, hidden)`."""
    stream = LayerStream(problem.model, problem.tokens, problem.calibration_batch_size)
    for index in range(first):
        dense = {}
        for group in (group for group in problem.groups if group.layer == index):
            for path in group.members:
                linear = linear_at(problem.model, path)
                dense[path] = linear.weight.data
                score = saliency(linear.weight, _on_device(problem, path))
                mask = permuted_nm_mask(score, orders[group.name].to(score.device), problem.pattern)
                linear.weight.data = torch.where(mask, linear.weight.data, 0.0)
        stream.advance(index)
        for path, weight in dense.items():
            linear_at(problem.model, path).weight.data = weight
    return stream.states()


def _on_device(problem: LearningProblem, path: str) -> SaliencyFactors:
    return problem.factors[path].to(linear_at(problem.model, path).weight.device)


def _flips(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """Number of channels whose position differs."""
    return sum(int((after[name] != order).sum()) for name, order in before.items())
