"""Orders of a window as they learn: soft permutations, hard ones, and the masked linears that follow them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.permutation.foldable import SharedOrder, expanded
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.logits import BlockLogits, SoftBatch, soft_batches
from permllm.permutation.lcp.settings import LCPSettings
from permllm.runs.files import BEST_SO_FAR
from permllm.runs.tensors import save_tensors
from permllm.runtime import parallel
from permllm.training.learner import Learner, Moment, Window
from permllm.training.masked_linear import MaskedLinear
from permllm.training.problem import LearningProblem


def members(
    shared: Iterable[SharedOrder], layers: Container[int]
) -> Iterator[tuple[SharedOrder, ChannelGroup]]:
    """Give the channel groups of some layers, each with the order that it uses."""
    for order in shared:
        for group in order.groups:
            if group.layer in layers:
                yield order, group


class OrderLearner(Learner):
    """Orders of a window.

    Args:
        settings: of LCP.
        problem: whose model's linears in the window are masked linears now.
        shared: all orders of the model.
        window: of layers.
        orders: int64 `(channels,)` of all orders of the model at the start.
        logits: by order that learns.
        linears: masked linears by channel group of the window.

    Attributes:
        present: orders that the window uses, as they are now, on the device.
        best: of all orders of the model, on the CPU.
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
        self.blocks = logits
        self.linears = linears
        self.logits = nn.ModuleDict(
            {name.replace(".", "/"): block for name, block in logits.items()}
        )
        self.channels = sum(len(block.base) for block in logits.values())
        self.present = {
            order.name: orders[order.name].to(problem.device)
            for order, _ in members(shared, window)
        }
        self.best = {
            name: order.cpu() for name, order in orders.items()
        }  # those outside of the window too
        self._hard: dict[str, Tensor] = {}
        self._softs: dict[str, list[Tensor]] = {}
        self._batches: list[SoftBatch] = []
        self._before = self._at_epoch = self.present

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.logits.parameters()), "lr": self.settings.learning_rate}]

    def temperature(self, moment: Moment) -> float:
        """Return the temperature of the soft permutations."""
        by_epoch = self.settings.conventions == "paper"
        progress = (
            moment.epoch / moment.epochs if by_epoch else moment.step / max(1, moment.steps - 1)
        )
        return self.settings.temperature(progress)

    @override
    @torch.no_grad()
    def begin(self, moment: Moment) -> None:
        self._before = self.present
        # The paper's released code begins with a softmax of rows: a first iteration does the same,
        # where there is one.
        halves = 2 * self.settings.sinkhorn_iterations or int(self.settings.conventions == "paper")
        self._batches = soft_batches(self.blocks, self.temperature(moment), halves)
        try:
            hards = harden([batch.soft for batch in self._batches])
        except ValueError as error:
            parts = (
                (name, part)
                for batch in self._batches
                for (name, _), part in batch.parts(batch.soft)
            )
            broken = next(name for name, part in parts if not bool(part.isfinite().all()))
            raise ValueError(f"the soft permutation of {broken} is not finite") from error
        found, softs = dict[tuple[str, int], Tensor](), dict[tuple[str, int], Tensor]()
        for batch, hard in zip(self._batches, hards, strict=True):
            del batch.soft
            found |= {stack: mine.flatten() for stack, mine in batch.parts(hard)}
            softs |= zip(batch.stacks, batch.stand_ins, strict=True)
        for name, block in self.blocks.items():
            stacks = [(name, number) for number in range(len(block.logits))]
            self._softs[name] = [softs[stack] for stack in stacks]
            self._hard[name] = torch.cat([found[stack] for stack in stacks])
        self.present = self.present | {
            name: block.order(self._hard[name]) for name, block in self.blocks.items()
        }

    @override
    def collect(self) -> None:
        for batch in self._batches:
            batch.backward()

    @override
    def set_layer(self, index: int, moment: Moment | None) -> None:
        for order, group in members(self.shared, (index,)):
            perm, hard, soft = order.expand(self.present[order.name]), None, list[Tensor]()
            if moment is not None and order.name in self.blocks:
                hard, soft = (
                    order.expand_rows(self._hard[order.name]),
                    order.expand_blocks(self._softs[order.name]),
                )
            for linear in self.linears[group.name]:
                linear.set_order(perm, hard, soft)

    @override
    def flips(self) -> Tensor:
        return _moved(self._before, self.present)

    @override
    def step_values(self, moment: Moment, flips: float | None) -> dict[str, float]:
        return {"temperature": self.temperature(moment), "flips": (flips or 0.0) / self.channels}

    @override
    def begin_epoch(self) -> None:
        self._at_epoch = self.present

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
        orders = {"best": self.best, "present": self.present, "at_epoch": self._at_epoch}
        return {"logits": self.logits.state_dict()} | orders

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self.best = {name: order.cpu() for name, order in state["best"].items()}
        self.logits.load_state_dict(state["logits"])
        self.present = {
            name: order.to(self.problem.device) for name, order in state["present"].items()
        }
        self._at_epoch = {
            name: order.to(self.problem.device) for name, order in state["at_epoch"].items()
        }


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    """Count the channels whose position differs, a scalar on the device."""
    return (torch.cat(list(before.values())) != torch.cat([after[name] for name in before])).sum()
