"""The orders of a window as they learn: soft permutations, hard ones, and what a masked linear needs of both."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.permutation.foldable import SharedOrder, expanded
from permllm.permutation.lcp.assignment import harden_together
from permllm.permutation.lcp.logits import BlockLogits, SoftBatch, soft_batches
from permllm.permutation.lcp.settings import LCPSettings
from permllm.permutation.lcp.sinkhorn import SinkhornStart
from permllm.runs.names import BEST_SO_FAR
from permllm.runs.tensors import save_tensors
from permllm.runtime import parallel
from permllm.training.learner import Learner, Moment, Window
from permllm.training.masked_linear import MaskedLinear
from permllm.training.problem import LearningProblem


def members(
    shared: Iterable[SharedOrder], window: Window, layer: int | None = None
) -> Iterator[tuple[SharedOrder, ChannelGroup]]:
    """The channel groups of a window, or of one of its layers, each with the order that it uses."""
    for order in shared:
        for group in order.groups:
            if group.layer in window if layer is None else group.layer == layer:
                yield order, group


class OrderLearner(Learner):
    """The orders of a window.

    Args:
        settings: of LCP.
        problem: whose model's linears in the window are masked linears now.
        shared: all orders of the model.
        window: of layers.
        orders: int64 `(channels,)` of all orders of the model at the start.
        logits: by order that learns.
        linears: masked linears by channel group of the window.

    Attributes:
        present: order of each that learns, as it is now, on the device.
        best: of all orders of the model, on the CPU.
        harden_seconds: of the latest step.
    """

    def __init__(
        self,
        settings: LCPSettings,
        problem: LearningProblem,
        shared: list[SharedOrder],
        window: Window,
        orders: Mapping[str, Tensor],
        logits: dict[str, BlockLogits],
        linears: dict[str, list[MaskedLinear]],
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.shared = shared
        self.window = window
        self.blocks = logits
        self.linears = linears
        self.logits = nn.ModuleDict({name.replace(".", "/"): block for name, block in logits.items()})
        self.learning = [order for order in shared if order.name in logits]
        self.channels = sum(order.channels for order in self.learning)
        self.present: dict[str, Tensor] = {name: block.base for name, block in logits.items()}
        used = {order.name for order, _ in members(shared, window)}
        self.fixed = {name: orders[name].to(problem.device) for name in used if name not in logits}
        self.best = {name: order.cpu() for name, order in orders.items()}  # those outside of the window too
        self.harden_seconds = 0.0
        self._hard: dict[str, Tensor] = {}
        self._softs: dict[str, list[Tensor]] = {}
        self._batches: list[SoftBatch] = []
        self._before = self._at_epoch = self.present

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.logits.parameters()), "lr": self.settings.learning_rate}]

    def temperature(self, moment: Moment) -> float:
        """Of the soft permutations."""
        if self.settings.conventions == "paper":
            return self.settings.temperature(moment.epoch / moment.epochs)
        return self.settings.temperature(moment.step / max(1, moment.steps - 1))

    @override
    def begin(self, moment: Moment) -> None:
        """Every order that learns, from the present logits."""
        self._before = self.present
        self._harden(self.temperature(moment))

    @torch.no_grad()
    def _harden(self, temperature: float) -> None:
        start: SinkhornStart = "softmax" if self.settings.conventions == "paper" else "exponential"
        asked = (temperature, self.settings.sinkhorn_iterations, start)
        self._batches = soft_batches(self.blocks, *asked)
        started = time.perf_counter()
        try:
            hards = harden_together([batch.soft for batch in self._batches])
        except ValueError as error:
            broken = next(filter(None, (batch.broken() for batch in self._batches)), "some order")
            raise ValueError(f"the soft permutation of {broken} is not finite") from error
        self.harden_seconds = time.perf_counter() - started
        found: dict[str, dict[int, Tensor]] = {name: {} for name in self.blocks}
        softs: dict[str, dict[int, Tensor]] = {name: {} for name in self.blocks}
        for batch, hard in zip(self._batches, hards, strict=True):
            del batch.soft
            for (name, number), mine, stand_in in zip(batch.stacks, batch.split(hard), batch.stand_ins, strict=True):
                found[name][number], softs[name][number] = mine.flatten(), stand_in
        self._hard = {name: torch.cat([of[number] for number in range(len(of))]) for name, of in found.items()}
        self._softs = {name: [of[number] for number in range(len(of))] for name, of in softs.items()}
        self.present = {name: self.blocks[name].order(hard) for name, hard in self._hard.items()}

    @override
    def collect(self) -> None:
        for batch in self._batches:
            batch.backward()

    @override
    def set_layer(self, index: int, moment: Moment | None) -> None:
        for order, group in members(self.shared, self.window, index):
            self._set_order(order, self.linears[group.name], moment)

    def _set_order(self, order: SharedOrder, linears: list[MaskedLinear], moment: Moment | None) -> None:
        if order.name in self.fixed:
            for linear in linears:
                linear.set_order(order.expand(self.fixed[order.name]))
            return
        soft = []
        if moment is not None:
            soft = order.expand_blocks(self._softs[order.name])
        perm, hard = order.expand(self.present[order.name]), order.expand_rows(self._hard[order.name])
        for linear in linears:
            linear.set_order(perm, hard, soft)

    @override
    def flips(self) -> Tensor:
        """Number of channels whose position has changed."""
        return _moved(self._before, self.present)

    @override
    def step_values(self, moment: Moment, flips: float | None) -> dict[str, float]:
        return {"temperature": self.temperature(moment), "flips": (flips or 0.0) / self.channels}

    @override
    def begin_epoch(self) -> None:
        self._at_epoch = dict(self.present)

    @override
    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        moved = float(_moved(self._at_epoch, self.present))
        return {"temperature": self.temperature(moment), "flips": moved / self.channels}

    @override
    def keep(self) -> None:
        self.best |= {name: order.cpu() for name, order in self.present.items()}

    @override
    def write_best(self, directory: Path) -> str:
        file = directory / BEST_SO_FAR
        if parallel.rank() == 0:
            save_tensors(file, expanded(self.shared, self.best))
        return f"; the best permutation so far is in {file} (permutation=from_file permutation.path={file})"

    @override
    def state(self) -> dict[str, Any]:
        return {
            "logits": self.logits.state_dict(),
            "best": self.best,
            "present": self.present,
            "at_epoch": self._at_epoch,
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self.best = {name: order.cpu() for name, order in state["best"].items()}
        self.logits.load_state_dict(state["logits"])
        device = self.problem.device
        self.present = {name: order.to(device) for name, order in state["present"].items()}
        self._at_epoch = {name: order.to(device) for name, order in state["at_epoch"].items()}


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    """Number of channels whose position differs, a scalar on the device."""
    return (torch.cat(list(before.values())) != torch.cat([after[name] for name in before])).sum()
