"""Learner of a stage's permutations, soft and hard, which it sets in the masked linears."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import ChannelGroup
from permllm.permutation.foldable import SharedOrder
from permllm.permutation.lcp.assignment import harden
from permllm.permutation.lcp.logits import BlockLogits, SoftBatch, soft_batches
from permllm.training.learner import Learner, Moment
from permllm.training.masked_linear import MaskedLinear


def members(
    shared: Iterable[SharedOrder], layers: Container[int]
) -> Iterator[tuple[SharedOrder, ChannelGroup]]:
    """Yield the channel groups in some layers, each with its shared permutation."""
    for order in shared:
        for group in order.groups:
            if group.layer in layers:
                yield order, group


class OrderLearner(Learner):
    """Learner of the shared permutations in a stage.

    Args:
        shared: all shared permutations of the model.
        orders: their values at the start, int64 `(channels,)` by name.
        logits: logits of each permutation that learns, by name.
        linears: masked linears of each channel group in the stage.
        temperature: returns the temperature of the soft permutations in a step.
        halves: number of half iterations in Sinkhorn's normalisation.

    Attributes:
        present: present values of all shared permutations, on the device of the logits.
        best: best values of all shared permutations, on the CPU.
    """

    def __init__(
        self,
        shared: list[SharedOrder],
        orders: Mapping[str, Tensor],
        logits: dict[str, BlockLogits],
        linears: dict[str, list[MaskedLinear]],
        temperature: Callable[[Moment], float],
        halves: int,
    ) -> None:
        self.shared = shared
        self.blocks = logits
        self.linears = linears
        self.logits = nn.ModuleDict(
            {name.replace(".", "/"): block for name, block in logits.items()}
        )
        self.temperature = temperature
        self.halves = halves
        bases = [block.base for block in logits.values()]
        self.channels = sum(map(len, bases))
        self.device = bases[0].device
        self.present = {name: order.to(self.device) for name, order in orders.items()}
        self.best = {name: order.cpu() for name, order in orders.items()}
        self._hard: dict[str, Tensor] = {}
        self._softs: dict[str, list[Tensor]] = {}
        self._batches: list[SoftBatch] = []
        # Permutations of the last step, and of the last epoch's end.
        self._at_step = self._at_epoch = self.present

    @override
    def parameters(self) -> list[Tensor]:
        return list(self.logits.parameters())

    @override
    @torch.no_grad()
    def begin(self, moment: Moment) -> None:
        """Make the soft and the hard permutations of a step."""
        self._batches = soft_batches(self.blocks, self.temperature(moment), self.halves)
        hards: dict[tuple[str, int], Tensor] = {}
        softs: dict[tuple[str, int], Tensor] = {}
        try:
            solved = harden([batch.soft for batch in self._batches])
        except ValueError as error:
            parts = (part for batch in self._batches for part in batch.parts(batch.soft).items())
            broken = next(name for (name, _), soft in parts if not bool(soft.isfinite().all()))
            raise ValueError(f"the soft permutation of {broken} is not finite") from error
        for batch, hard in zip(self._batches, solved, strict=True):
            del batch.soft
            hards |= batch.parts(hard)
            softs |= zip(batch.stacks, batch.stand_ins, strict=True)
        self.present = dict(self.present)
        for name, block in self.blocks.items():
            stacks = [(name, number) for number in range(len(block.logits))]
            self._softs[name] = [softs[stack] for stack in stacks]
            self._hard[name] = torch.cat([hards[stack].flatten() for stack in stacks])
            self.present[name] = block.order(self._hard[name])

    @override
    def collect(self) -> None:
        """Send the gradients of the soft permutations on to the logits."""
        for batch in self._batches:
            batch.backward()

    @override
    def set_layer(self, index: int) -> None:
        """Set the permutations of a layer's masked linears."""
        for order, group in members(self.shared, (index,)):
            perm = order.expand(self.present[order.name])
            hard = None
            soft: list[Tensor] = []
            if torch.is_grad_enabled() and order.name in self.blocks:
                hard = order.expand_rows(self._hard[order.name])
                soft = order.expand_blocks(self._softs[order.name])
            for linear in self.linears[group.name]:
                linear.set_order(perm, hard, soft)

    @override
    def flips(self) -> Tensor:
        """Return the number of channels that moved since the last step."""
        moved = self._moved(self._at_step)
        self._at_step = self.present
        return moved

    @override
    def step_values(self, moment: Moment, flips: float = 0.0) -> dict[str, float]:
        """Return the temperature, and the share of channels that moved."""
        return {"temperature": self.temperature(moment), "flips": flips / self.channels}

    @override
    def begin_epoch(self) -> None:
        self._at_epoch = self.present

    @override
    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        """Return the temperature, and the share of channels that moved in the epoch."""
        return self.step_values(moment, float(self._moved(self._at_epoch)))

    def _moved(self, before: dict[str, Tensor]) -> Tensor:
        """Count the channels that have moved since `before`, as a scalar on the device."""
        now = torch.cat([self.present[name] for name in self.blocks])
        return (torch.cat([before[name] for name in self.blocks]) != now).sum()

    @override
    def keep(self) -> None:
        self.best = {name: order.cpu() for name, order in self.present.items()}

    @override
    def state(self) -> dict[str, Any]:
        return {
            "logits": self.logits.state_dict(),
            "best": self.best,
            "present": self.present,
            "at_step": self._at_step,
            "at_epoch": self._at_epoch,
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        def moved_here(key: str) -> dict[str, Tensor]:
            return {name: order.to(self.device) for name, order in state[key].items()}

        self.best = {name: order.cpu() for name, order in state["best"].items()}
        self.logits.load_state_dict(state["logits"])
        self.present = moved_here("present")
        self._at_step = moved_here("at_step")
        self._at_epoch = moved_here("at_epoch")
